"""The sparse phase of structured sparsification: what happens while it trains, and the decision in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.graph.convolutions import by_value, listed
from tersenet.graph.grouping import Grouping, groupable, kernel_norms, trunk_ties
from tersenet.group_learning.costs import Unit, costs_in
from tersenet.group_learning.maps import group_map, times
from tersenet.ops.channel_order import Order, Problem, improved_all
from tersenet.ops.group_levels import Matrix, allowed_levels, cost_matrix, finest_level, group_counts, kept_norms
from tersenet.ops.sparsity_control import global_threshold, next_strength, trimmed_levels
from tersenet.results import GroupMap
from tersenet.train.hooks import Hooks, TrainState

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph
    from tersenet.methods.base import Context
    from tersenet.methods.structured_sparsification import StructuredSparsification


class GroupLearning(Hooks):
    """The sparse phase: orders, levels and the regulariser's coefficient, and the decision in the end."""

    def __init__(self, settings: StructuredSparsification, graph: ModelGraph, context: Context) -> None:
        self.settings = settings
        self.graph = graph
        self.seed = context.seed
        layers, self.left = groupable(graph, settings.include, settings.exclude)
        self.layers = {layer.name: layer for layer in layers}
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
        self.ties = trunk_ties(graph, self.layers) if settings.trunks == "shared" else []
        by_macs = context.target is not None and context.target.kind == "macs"
        unit: Unit = "measured time" if settings.latency is not None else "MACs" if by_macs else "weights"
        self.costs = costs_in(unit, graph, self.layers, self.counts, self.allowed, settings.latency_batch)
        self.goal = self._goal(context)
        self.maps: list[GroupMap] = []
        self._map_times = times(len(self.layers), settings.fit.epochs)
        # Of the present orders and levels: both change only right after `learn_orders`, which empties it.
        self._push: dict[str, Tensor] = {}

    def before_training(self, state: TrainState) -> None:
        norms = self.learn_orders(state.model, self.settings.first_rounds, self.settings.restarts)
        self._look(0, norms, self.levels_at(self.settings.threshold, self.norms_kept(norms)))

    def before_step(self, state: TrainState) -> None:
        """The regulariser's sub-gradient, which so enters the momentum. Without it, training is plain training."""
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
        self._look(epoch + 1, norms, self.levels)
        saved, used = self.costs.saved(self.levels), self.strength_in(epoch)
        if epoch >= settings.warmup:
            self.strength = next_strength(
                self.strength, settings.strength, saved, self.saved, self.goal, total - epoch, total, settings.gain
            )
        self.saved = saved
        return {"saved": saved, "strength": used, "groups": [*self.costs.groups(self.levels).values()]}

    def selectable(self, epoch: int) -> bool:
        """Before the end, the weights outside the groups are still needed."""
        return epoch == self.settings.fit.epochs - 1

    def strength_in(self, epoch: int) -> float:
        """The regulariser's coefficient in this epoch."""
        return self.strength if epoch >= self.settings.warmup else 0.0

    def push(self, name: str, weight: Tensor) -> Tensor:
        """(C_out, C_in, 1, 1): what each kernel costs at its layer's level, in the layer's own order of channels."""
        if name not in self._push:
            layer, counts = self.layers[name], self.counts[name]
            depth = min(self.levels[name], len(counts) - 1)
            cost = cost_matrix(layer.C_out, layer.C_in, counts, self.settings.decay, depth)
            table = torch.from_numpy(self.orders[name].back(cost))[:, :, None, None]
            self._push[name] = table.to(device=weight.device, dtype=weight.dtype)
        return self._push[name]

    def norms(self, model: nn.Module) -> dict[str, Matrix]:
        """Layer -> the norms of its kernels, in the network's own order."""
        return {name: kernel_norms(model.get_parameter(layer.weight)) for name, layer in self.layers.items()}

    def learn_orders(self, model: nn.Module, rounds: int, restarts: int = 0) -> dict[str, Matrix]:
        """Better orders for the weights as they are now. Returns the layers' kernel norms."""
        norms = self.norms(model)
        problems = {
            name: Problem(S, self.counts[name], self.settings.decay, self.orders[name]) for name, S in norms.items()
        }
        self.orders = improved_all(problems, rounds, restarts, self.seed, ties=self.ties)
        self._push.clear()
        return norms

    def norms_kept(self, norms: dict[str, Matrix]) -> dict[str, Matrix]:
        """Layer -> the norm that each level keeps in the present order."""
        return {name: kept_norms(self.orders[name].of(S), self.counts[name]) for name, S in norms.items()}

    def levels_at(self, threshold: float, kept: dict[str, Matrix]) -> dict[str, int]:
        """The finest level of every layer that leaves at most `threshold` of its norm outside the groups."""
        return {name: finest_level(kept[name], threshold, self.allowed[name]) for name in self.layers}

    def macs(self, groupings: dict[str, Grouping]) -> int:
        """MACs of the network with these groups."""
        removed = (x.macs - x.macs // groupings[n].groups for n, x in self.layers.items() if n in groupings)
        return self.graph.macs() - sum(removed)

    def decide(self, rounds: int | None = None) -> dict[str, Grouping]:
        """The groups that meet the goal with one threshold for all layers, in the present weights' best order, as far
        as `rounds` (default: the settings') alternations find it."""
        levels = dict.fromkeys(self.layers, 1)
        if self.goal > 0:
            kept = self.norms_kept(self.learn_orders(self.graph.model, rounds or self.settings.rounds))
            threshold = global_threshold(lambda q: self.costs.saved(self.levels_at(q, kept)), self.goal)
            levels = self.levels_at(threshold, kept)
            if self.settings.trim:
                levels = self._trimmed(levels, kept)
        counts = self.costs.groups(levels)
        return {name: Grouping(groups, self.orders[name]) for name, groups in counts.items() if groups > 1}

    def describe(self, groupings: dict[str, Grouping]) -> list[str]:
        saved = self.costs.saved_by_groups({name: grouping.groups for name, grouping in groupings.items()})
        groups = ", ".join(f"{name} {grouping.groups}" for name, grouping in groupings.items()) or "none"
        whole = {name: "no level of groups fits it" for name, allowed in self.allowed.items() if allowed == 1}
        asked = f"asked for {self.goal:.2%}"
        return [
            f"{saved:.2%} of the groupable convolutions' {self.costs.unit} went ({asked}); groups: {groups}",
            *(f"{listed(names)} left as is: {why}" for why, names in by_value(self.left | whole).items()),
        ]

    def state_dict(self) -> dict[str, Any]:
        orders = {n: [torch.from_numpy(o.rows), torch.from_numpy(o.columns)] for n, o in self.orders.items()}
        maps = [shown.model_dump() for shown in self.maps]
        goal = {"levels": dict(self.levels), "strength": self.strength, "saved": self.saved}
        return {"orders": orders, **goal, "maps": maps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.orders = {name: Order(rows.numpy(), columns.numpy()) for name, (rows, columns) in saved["orders"].items()}
        self.levels = dict(saved["levels"])
        self.strength, self.saved = float(saved["strength"]), float(saved["saved"])
        self.maps = [GroupMap.model_validate(shown) for shown in saved["maps"]]
        self._push.clear()

    def _trimmed(self, levels: dict[str, int], kept: dict[str, Matrix]) -> dict[str, int]:
        shares = {name: (norms / max(norms[0], 1e-30)).tolist() for name, norms in kept.items()}
        spare = (self.costs.saved(levels) - self.goal) * self.costs.whole
        best = {name: self.costs.best(name, level) for name, level in levels.items()}
        return trimmed_levels(best, shares, self.costs.levels, spare)

    def _look(self, epoch: int, norms: dict[str, Matrix], levels: dict[str, int]) -> None:
        """Keep maps for the report, at some times of the training."""
        if epoch in self._map_times:
            self.maps += self._maps(epoch, norms, self.costs.groups(levels))

    def maps_of(self, groupings: dict[str, Grouping]) -> list[GroupMap]:
        """All maps, those of what was decided at last."""
        groups = {name: groupings[name].groups if name in groupings else 1 for name in self.layers}
        return [*self.maps, *self._maps(self.settings.fit.epochs, self.norms(self.graph.model), groups)]

    def _maps(self, epoch: int, norms: dict[str, Matrix], groups: dict[str, int]) -> list[GroupMap]:
        found: list[GroupMap] = []
        for name in (name for name, allowed in self.allowed.items() if allowed > 1):
            S = self.orders[name].of(norms[name])
            inside = float(kept_norms(S, self.counts[name])[self.counts[name].index(groups[name])])
            found.append(group_map(name, epoch, S, groups[name], inside))
        return found

    def _goal(self, context: Context) -> float:
        """The share of the groupable layers' cost to save.

        Raises:
            TersenetError: neither a sparsity nor a target, or one that the finest groups don't reach.
        """
        settings, target = self.settings, context.target
        if settings.latency is not None:
            goal, wish = 1 - settings.latency, f"latency {settings.latency:g}"
        elif target is not None:
            by_macs = target.kind == "macs"
            now = self.graph.macs() if by_macs else self.graph.params()
            limit = target.limit(context.original_macs if by_macs else context.original_params)
            goal, wish = max(0.0, (now - limit) / self.costs.whole), f"the {target.kind} target"
        elif settings.sparsity is not None:
            goal, wish = settings.sparsity, f"sparsity {settings.sparsity:g}"
        else:
            raise TersenetError(
                "structured_sparsification needs a sparsity (share of the convolutions' weights removed), a latency or "
                "a target (macs=50%)"
            )
        reached = self.costs.saved(self.allowed)
        if goal > reached + 1e-12:
            raise TersenetError(
                f"{wish} can't be met: it asks for {goal:.2%} of the groupable convolutions' {self.costs.unit}, and "
                f"their finest groups save {reached:.2%}. Include more layers, lower min_group_width, raise "
                "max_groups, or set any_divisor"
            )
        return goal
