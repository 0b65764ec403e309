"""Structured sparsification: convolutions become grouped ones, with a learned channel shuffle between them.

During training, every layer's channels are put in the order that brings its large kernels together in diagonal blocks,
and what lies outside the blocks is pushed towards zero. In the end it is cut off, and each layer is a grouped
convolution whose channels are shuffled as learned. Fine-tuning is a `train` step behind this one.

Source: Zhang et al., Model-Agnostic Structured Sparsification with Learnable Channel Shuffle, arXiv 2002.08127.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, TrainingMethod
from tersenet.ops.sparsity_control import global_threshold, next_strength, trimmed_levels
from tersenet.train.hooks import Hooks, TrainState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tersenet.graph.grouping import Groupable, Grouping
    from tersenet.graph.model import ModelGraph
    from tersenet.ops.channel_order import Order
    from tersenet.ops.group_levels import Matrix


class StructuredSparsification(TrainingMethod):
    """Learn which channels belong together, push the other connections to zero, and make grouped convolutions.

    Differs: any network with plain Conv2d layers; the weights are masked once, in the end, and never in forward; what
    is saved is the grouped network, its gathers fused; parameters count as they are, not by the layers' names; the
    finest grouping can be reached; odd and dead layers stay as they are; biases are put in order too.
    """

    method: ClassVar[str] = "structured_sparsification"

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share of the groupable convolutions' weights removed (the paper's). A target goes before it."""
    include: tuple[str, ...] = ("*",)
    """Convolutions to group, by name pattern, `position:first` or `position:last`."""
    exclude: tuple[str, ...] | None = None
    """Convolutions to leave as they are. Default: those that read the network's input."""
    threshold: float = Field(default=0.1, gt=0, lt=1)
    """Share of a layer's norm that may lie outside its groups while it trains."""
    decay: float = Field(default=0.5, gt=0, le=1)
    """How much less a connection costs at each finer split."""
    any_divisor: bool = False
    """Split by odd factors too, not only by two: for channels that were pruned before."""
    min_group_width: int = Field(default=2, ge=1)
    """Channels that every group has at least, on both sides. 2 gives the paper's finest grouping."""
    max_groups: int | None = Field(default=None, ge=1)
    """The largest number of groups."""
    strength: float = Field(default=2e-6, ge=0)
    """The regulariser's first coefficient, and the step by which it changes."""
    gain: float | None = Field(default=None, gt=0)
    """Steps per average pace that an epoch falls short of; by default at most one step per epoch (the paper)."""
    warmup: int = Field(default=5, ge=0)
    """First epochs without the regulariser."""
    first_rounds: int = Field(default=50, ge=1)
    """Alternations of the assignment before training, at most."""
    rounds: int = Field(default=20, ge=1)
    """The same after every epoch."""
    every_steps: int | None = Field(default=None, ge=1)
    """Learn the order inside an epoch too, after every so many steps: 500 for ImageNet."""
    step_rounds: int = Field(default=5, ge=1)
    """Alternations then."""
    restarts: int = Field(default=0, ge=0)
    """Random orders to start from beside the known one, before training."""
    trim: bool = False
    """Give back groups, layer by layer, while the goal stays met; by default what one threshold saves above it stays
    saved (the paper)."""
    fuse: bool = True
    """Put the channels between layers in the order that one of them wants, which leaves fewer gathers."""

    @model_validator(mode="after")
    def _pushes_at_all(self) -> StructuredSparsification:
        if self.warmup >= self.fit.epochs:
            raise ValueError(f"warmup (={self.warmup}) must be below the number of epochs (={self.fit.epochs})")
        return self

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Rehearse the grouping on a copy, in any order: hours of training must not end with a refusal."""
        self._rehearse(graph.copy(), context, rounds=1)

    def preview(self, graph: ModelGraph, context: Context) -> None:
        context.notes += self._rehearse(graph, context, self.rounds)

    def _rehearse(self, graph: ModelGraph, context: Context, rounds: int) -> list[str]:
        from tersenet.graph.grouping import group_convolutions, mask_groups

        hooks = self.hooks(graph, context)
        groupings = hooks.decide(rounds)
        mask_groups(hooks.graph, groupings)
        group_convolutions(hooks.graph, groupings, self.fuse)
        return hooks.describe(groupings)

    def hooks(self, graph: ModelGraph, context: Context) -> GroupLearning:
        from tersenet.graph.grouping import groupable

        graph = graph.with_residual("coupled")
        layers, left = groupable(graph, self.include, self.exclude)
        return GroupLearning(self, graph, layers, left, context)

    def finish(self, graph: ModelGraph, context: Context, hooks: Hooks) -> None:
        """Cut what lies outside the groups, measure with the zeros in, then make grouped convolutions."""
        from tersenet.graph.grouping import group_convolutions, mask_groups

        if not isinstance(hooks, GroupLearning):
            raise TypeError("finish needs the hooks that this method made")
        groupings = hooks.decide()
        unmasked = context.evaluate()
        mask_groups(hooks.graph, groupings)
        context.masked = context.evaluate()
        context.equality = group_convolutions(hooks.graph, groupings, self.fuse)
        if unmasked is not None and unmasked.top1 is not None:
            context.notes.append(f"top-1 was {unmasked.top1:.2%} before the weights outside the groups were cut off")
        context.notes += hooks.describe(groupings)


class GroupLearning(Hooks):
    """The sparse phase: orders, levels and the regulariser's coefficient, and the decision in the end."""

    def __init__(
        self,
        settings: StructuredSparsification,
        graph: ModelGraph,
        layers: list[Groupable],
        left: dict[str, str],
        context: Context,
    ) -> None:
        """Args: left: the other convolutions, with the reason why they stay as they are."""
        from tersenet.ops.channel_order import Order
        from tersenet.ops.group_levels import allowed_levels, group_counts

        self.settings = settings
        self.graph = graph
        self.seed = context.seed
        self.layers = {layer.name: layer for layer in layers}
        self.left = left
        self.counts = {n: group_counts(x.C_out, x.C_in, settings.any_divisor) for n, x in self.layers.items()}
        self.allowed = {
            n: allowed_levels(self.counts[n], x.C_out, x.C_in, settings.min_group_width, settings.max_groups)
            for n, x in self.layers.items()
        }
        if max(self.allowed.values()) == 1:
            raise TersenetError(
                f"no layer is left to group: the channels of {', '.join(self.layers)} can't be split into equal "
                "groups. Set any_divisor, or lower min_group_width"
            )
        self.orders: dict[str, Order] = {n: Order.identity(x.C_out, x.C_in) for n, x in self.layers.items()}
        self.levels = dict.fromkeys(self.layers, 1)
        self.strength = settings.strength
        self.saved = 0.0
        by_macs = context.target is not None and context.target.kind == "macs"
        self.unit = "MACs" if by_macs else "weights"
        self.costs = {n: x.macs if by_macs else x.params for n, x in self.layers.items()}
        self.goal = self._goal(context)
        self._push: dict[str, Tensor] = {}

    def before_training(self, state: TrainState) -> None:
        self.learn_orders(state.model, self.settings.first_rounds, self.settings.restarts)

    def before_step(self, state: TrainState) -> None:
        """The regulariser's sub-gradient, which so enters the momentum. Without it, training is plain training."""
        import torch

        strength = self.strength_in(state.epoch)
        if strength == 0:
            return
        for name, layer in self.layers.items():
            weight = state.model.get_parameter(layer.weight)
            if weight.grad is not None:
                weight.grad.addcmul_(torch.sign(weight.detach()), self.push(name, weight), value=strength)

    def after_step(self, state: TrainState) -> None:
        every = self.settings.every_steps
        if every is not None and state.step % every == 0:
            self.learn_orders(state.model, self.settings.step_rounds)

    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        settings, epoch, total = self.settings, state.epoch, state.fit.epochs
        norms = self.learn_orders(state.model, settings.rounds)
        self.levels = self.levels_at(settings.threshold, self.norms_kept(norms))
        saved, used = self.saved_by(self.levels), self.strength_in(epoch)
        if epoch >= settings.warmup:
            self.strength = next_strength(
                self.strength, settings.strength, saved, self.saved, self.goal, total - epoch, total, settings.gain
            )
        self.saved = saved
        groups = [self.counts[name][level - 1] for name, level in self.levels.items()]
        return {"saved": saved, "strength": used, "groups": groups}

    def selectable(self, epoch: int) -> bool:
        """Before the end, the weights outside the groups are still needed."""
        return epoch == self.settings.fit.epochs - 1

    def strength_in(self, epoch: int) -> float:
        """The regulariser's coefficient in this epoch."""
        return self.strength if epoch >= self.settings.warmup else 0.0

    def push(self, name: str, weight: Tensor) -> Tensor:
        """(C_out, C_in, 1, 1): what each kernel costs at its layer's level, in the layer's own order of channels."""
        import torch

        from tersenet.ops.group_levels import cost_matrix

        if name not in self._push:
            layer, counts = self.layers[name], self.counts[name]
            depth = min(self.levels[name], len(counts) - 1)
            cost = cost_matrix(layer.C_out, layer.C_in, counts, self.settings.decay, depth)
            table = torch.from_numpy(self.orders[name].back(cost))[:, :, None, None]
            self._push[name] = table.to(device=weight.device, dtype=weight.dtype)
        return self._push[name]

    def norms(self, model: nn.Module) -> dict[str, Matrix]:
        from tersenet.graph.grouping import kernel_norms

        return {name: kernel_norms(model.get_parameter(layer.weight)) for name, layer in self.layers.items()}

    def learn_orders(self, model: nn.Module, rounds: int, restarts: int = 0) -> dict[str, Matrix]:
        """Better orders for the weights as they are now. Returns the layers' kernel norms."""
        from tersenet.ops.channel_order import Problem, improved_all

        norms = self.norms(model)
        problems = {
            name: Problem(S, self.counts[name], self.settings.decay, self.orders[name]) for name, S in norms.items()
        }
        self.orders = improved_all(problems, rounds, restarts, self.seed)
        self._push.clear()
        return norms

    def norms_kept(self, norms: dict[str, Matrix]) -> dict[str, Matrix]:
        """Layer -> the norm that each level keeps in the present order."""
        from tersenet.ops.group_levels import kept_norms

        return {name: kept_norms(self.orders[name].of(S), self.counts[name]) for name, S in norms.items()}

    def levels_at(self, threshold: float, kept: dict[str, Matrix]) -> dict[str, int]:
        from tersenet.ops.group_levels import finest_level

        self._push.clear()
        return {name: finest_level(kept[name], threshold, self.allowed[name]) for name in self.layers}

    def saved_by(self, levels: dict[str, int]) -> float:
        """What these levels save, as a share of the groupable layers' cost: weights, or MACs with a MACs target."""
        left = sum(cost / self.counts[name][levels[name] - 1] for name, cost in self.costs.items())
        return 1 - left / sum(self.costs.values())

    def macs(self, groupings: dict[str, Grouping]) -> int:
        """MACs of the network with these groups."""
        removed = (x.macs - x.macs // groupings[n].groups for n, x in self.layers.items() if n in groupings)
        return self.graph.macs() - sum(removed)

    def decide(self, rounds: int | None = None) -> dict[str, Grouping]:
        """The groups that meet the goal with one threshold for all layers, in the present weights' best order, as far
        as `rounds` (default: the settings') alternations find it."""
        from tersenet.graph.grouping import Grouping

        levels = dict.fromkeys(self.layers, 1)
        if self.goal > 0:
            kept = self.norms_kept(self.learn_orders(self.graph.model, rounds or self.settings.rounds))
            threshold = global_threshold(lambda q: self.saved_by(self.levels_at(q, kept)), self.goal)
            levels = self.levels_at(threshold, kept)
            if self.settings.trim:
                levels = self._trimmed(levels, kept)
        counts = {name: self.counts[name][level - 1] for name, level in levels.items()}
        return {name: Grouping(groups, self.orders[name]) for name, groups in counts.items() if groups > 1}

    def describe(self, groupings: dict[str, Grouping]) -> list[str]:
        from tersenet.graph.convolutions import by_value, listed

        kept = {n: cost / groupings[n].groups if n in groupings else cost for n, cost in self.costs.items()}
        saved = 1 - sum(kept.values()) / sum(self.costs.values())
        groups = ", ".join(f"{name} {grouping.groups}" for name, grouping in groupings.items()) or "none"
        whole = {name: "no level of groups fits it" for name, allowed in self.allowed.items() if allowed == 1}
        asked = f"asked for {self.goal:.2%}"
        return [
            f"{saved:.2%} of the groupable convolutions' {self.unit} went ({asked}); groups: {groups}",
            *(f"{listed(names)} left as is: {why}" for why, names in by_value(self.left | whole).items()),
        ]

    def state_dict(self) -> dict[str, Any]:
        import torch

        orders = {n: [torch.from_numpy(o.rows), torch.from_numpy(o.columns)] for n, o in self.orders.items()}
        return {"orders": orders, "levels": dict(self.levels), "strength": self.strength, "saved": self.saved}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        from tersenet.ops.channel_order import Order

        self.orders = {name: Order(rows.numpy(), columns.numpy()) for name, (rows, columns) in saved["orders"].items()}
        self.levels = dict(saved["levels"])
        self.strength, self.saved = float(saved["strength"]), float(saved["saved"])
        self._push.clear()

    def _trimmed(self, levels: dict[str, int], kept: dict[str, Matrix]) -> dict[str, int]:
        shares = {name: (norms / max(norms[0], 1e-30)).tolist() for name, norms in kept.items()}
        costs = {n: [cost / count for count in self.counts[n]] for n, cost in self.costs.items()}
        spare = (self.saved_by(levels) - self.goal) * sum(self.costs.values())
        return trimmed_levels(levels, shares, costs, spare)

    def _goal(self, context: Context) -> float:
        """The share of the groupable layers' cost to save.

        Raises:
            TersenetError: neither a sparsity nor a target, or one that the finest groups don't reach.
        """
        target, goal = context.target, self.settings.sparsity
        if target is not None:
            by_macs = target.kind == "macs"
            now = self.graph.macs() if by_macs else self.graph.params()
            limit = target.limit(context.original_macs if by_macs else context.original_params)
            goal = max(0.0, (now - limit) / sum(self.costs.values()))
        if goal is None:
            raise TersenetError(
                "structured_sparsification needs a sparsity (share of the convolutions' weights removed) or a target "
                "(macs=50%)"
            )
        reached = self.saved_by(self.allowed)
        if goal > reached + 1e-12:
            wish = f"the {target.kind} target" if target is not None else f"sparsity {goal:g}"
            raise TersenetError(
                f"{wish} can't be met: it asks for {goal:.2%} of the groupable convolutions' {self.unit}, and their "
                f"finest groups save {reached:.2%}. Include more layers, lower min_group_width, raise max_groups, or "
                "set any_divisor"
            )
        return goal
