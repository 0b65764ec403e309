"""Soft filter pruning (SFP) and its asymptotic form (ASFP).

After every epoch, the filters with the smallest norm are set to zero, and then train on like all others: what was
pruned too early can come back. After the last epoch the zeros are removed for good.

Source: He et al., Soft Filter Pruning for Accelerating Deep CNNs, IJCAI 2018, arXiv 1808.06866; Asymptotic Soft Filter
Pruning, IEEE Trans. Cybernetics 2019, arXiv 1808.07471.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, TrainingMethod
from tersenet.ops.rate_schedule import Schedule, asymptotic_decay, pruned_count, rate_at
from tersenet.train.hooks import Hooks, TrainState

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tersenet.graph.model import Kept, ModelGraph
    from tersenet.graph.units import ChannelGroup
    from tersenet.recipe_target import Target

Rate = Annotated[float, Field(ge=0, lt=1)]
PROJECTIONS = ("*downsample*", "*shortcut*")


class SoftFilterPruning(TrainingMethod):
    """Zero the weakest filters after every epoch, let them grow back, remove them in the end.

    Differs: the rate is the share that is REMOVED (the reference's is kept); counts are floor(C_out * rate + 1e-9);
    layers are found in the network's graph, not by parameter index; the constants that batch norm emits for removed
    filters are compensated everywhere, so that the compact network equals the masked one.
    """

    method: ClassVar[str] = "soft_filter_pruning"

    rate: Rate | None = None
    """Share of the filters removed in every layer. A target goes before it: the rate is then solved from that."""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """Rates of single layers, by name pattern; the first pattern that matches counts."""
    include: tuple[str, ...] = ("*",)
    """Layers to prune, by name pattern. Linear layers and what the network's outputs need are never pruned."""
    exclude: tuple[str, ...] | None = None
    """Layers to leave whole. Default: the projection shortcuts in residual mode `independent`, nothing in `coupled`."""
    residual: Literal["independent", "coupled"] = "independent"
    """`independent`: each block keeps its own channels, added into the full-width trunk (the paper). `coupled`: all
    layers that write to a trunk keep the same channels, and the trunk shrinks too."""
    schedule: Schedule = "constant"
    """`constant` is SFP; `asymptotic` is ASFP; `linear`, `cubic` and `cosine` rise as their names say."""
    initial_rate: Rate = 0.0
    """Where a rising schedule starts."""
    knee: float = Field(default=0.125, gt=0, lt=1)
    """Share of the run after which the asymptotic schedule has reached 3/4 of the rate."""
    interval: int = Field(default=1, ge=1)
    """Prune after every so many epochs; always after the last."""
    score: Literal["l2", "l1", "fpgm", "bn_scale"] = "l2"
    """What makes a filter weak: its norm, its distance to the other filters, or the scale of its batch norm."""
    decay: float = Field(default=0.0, ge=0, lt=1)
    """What pruned filters are multiplied by before the last epoch; 0 is the paper."""
    revive: Literal["both", "momentum", "gradient", "none"] = "both"
    """What may bring a pruned filter back: the optimizer's momentum, its gradient, both (the paper) or nothing."""
    multiple: int = Field(default=1, ge=1)
    """Leave a multiple of so many channels in every layer."""
    constants: Literal["auto", "exact", "zero"] = "auto"
    """What batch norm emits for removed filters: compensated exactly, silenced (`zero`), or exact where possible."""
    recalibrate_bn: int = Field(default=0, ge=0)
    """Training batches from which batch norm statistics are estimated anew after the last prune."""
    validate_before: bool = False
    """Validate before each prune too, as the reference does."""

    @model_validator(mode="after")
    def _schedule_exists(self) -> SoftFilterPruning:
        for rate in [r for r in (self.rate, *self.rates.values()) if r is not None]:
            self._check_curve(rate)
        return self

    def _check_curve(self, rate: float) -> None:
        """Raises: ValueError if the schedule can't rise to this rate."""
        if self.schedule != "constant" and self.initial_rate > rate:
            raise ValueError(f"initial_rate (={self.initial_rate}) must not be above the rate (={rate:.4g})")
        if self.schedule == "asymptotic":
            asymptotic_decay(rate, self.initial_rate, self.knee)

    def _check_solved(self, rate: float, target: Target) -> None:
        try:
            self._check_curve(rate)
        except ValueError as error:
            raise TersenetError(f"the {target.kind} target is met at rate {rate:.4g}, but {error}") from None

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Rehearse the removal on a copy: hours of training must not end with a refusal."""
        self.preview(graph.copy(), context)

    def preview(self, graph: ModelGraph, context: Context) -> None:
        from tersenet.graph.compact import compact

        hooks = self.hooks(graph, context)
        for group in hooks.groups:
            hooks.scores(group)
        compact(hooks.graph, self.kept(hooks.graph, hooks.rates), self.constants)

    def hooks(self, graph: ModelGraph, context: Context) -> SoftPruning:
        graph = graph.with_residual(self.residual)
        return SoftPruning(self, graph, self.plan(graph, context))

    def plan(self, graph: ModelGraph, context: Context) -> dict[str, float]:
        """Group name -> the rate at the end.

        Raises:
            TersenetError: neither a rate nor a target, nothing to prune, a target that can't be met, or a rate for it
                that the schedule can't rise to.
        """
        from tersenet.graph.budget import uniform_rate
        from tersenet.graph.select import named_rates, select_groups

        projections = PROJECTIONS if self.exclude is None and self.residual == "independent" else ()
        groups = select_groups(graph, self.include, self.exclude or (), default_exclude=("type:linear", *projections))
        fixed = named_rates(graph, groups, self.rates)
        free = [group for group in groups if group.name not in fixed]
        rate = self.rate
        if context.target is not None and free:
            original = context.original_macs if context.target.kind == "macs" else context.original_params

            def kept(rate: float) -> Kept:
                return self.kept(graph, fixed | {group.name: rate for group in free})

            rate = uniform_rate(graph, free, kept, context.target, original)
            self._check_solved(rate, context.target)
        if rate is None and free:
            raise TersenetError("soft_filter_pruning needs a rate (share of filters removed) or a target (macs=50%)")
        return fixed | {group.name: rate or 0.0 for group in free}

    def counts(self, graph: ModelGraph, rates: dict[str, float]) -> dict[str, int]:
        """Group name -> number of units removed at these rates."""
        return {name: pruned_count(graph.group(name).size, rate, self.multiple) for name, rate in rates.items()}

    def kept(self, graph: ModelGraph, rates: dict[str, float]) -> Kept:
        """Some channels of the right number in every group; which ones doesn't matter for counting."""
        import numpy as np

        return {n: np.arange(graph.group(n).size - removed) for n, removed in self.counts(graph, rates).items()}

    def finish(self, graph: ModelGraph, context: Context, hooks: Hooks) -> None:
        """Measure with the zeros in, then remove them."""
        from tersenet.graph.compact import compact

        if not isinstance(hooks, SoftPruning):
            raise TypeError("finish needs the hooks that this method made")
        graph = hooks.graph
        hooks.take_up_zeros()
        _describe(self, graph, hooks, context)
        if self.recalibrate_bn and context.data is not None and context.data.train is not None:
            from tersenet.train.recalibrate import recalibrate_bn

            recalibrate_bn(graph.model, context.data.train, self.recalibrate_bn, device=context.device)
        context.masked = context.evaluate()
        done = compact(graph, hooks.kept(), self.constants)
        context.equality = done.equality
        if done.zeroed:
            context.notes.append(
                f"batch norm and bias of the removed filters of {', '.join(done.zeroed)} were silenced "
                + ("as asked" if self.constants == "zero" else "(their constants can't be compensated exactly)")
                + "; the accuracy with zeros was measured before that"
            )


class SoftPruning(Hooks):
    """The soft phase: prune before training, after every `interval` epochs and after the last."""

    def __init__(self, settings: SoftFilterPruning, graph: ModelGraph, rates: dict[str, float]) -> None:
        self.settings = settings
        self.graph = graph
        self.rates = rates
        self.groups = [graph.group(name) for name in rates]
        self.pruned: dict[str, Tensor] = {}

    def before_training(self, state: TrainState) -> None:
        self.prune(state, done=0)

    def before_step(self, state: TrainState) -> None:
        if self.settings.revive in ("momentum", "none"):
            for weight, axis, places in self._pruned_filters():
                if weight.grad is not None:
                    weight.grad.index_fill_(axis, places, 0)

    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        if not self._prunes_after(state.epoch):
            return {}
        row: dict[str, Any] = {}
        if self.settings.validate_before:
            row["val_top1_before"] = state.evaluate().top1
        return row | self.prune(state, done=state.epoch + 1)

    def selectable(self, epoch: int) -> bool:
        """Only the end of the schedule has the network that was asked for."""
        at_goal = self.settings.schedule == "constant" and self.settings.decay == 0
        return epoch == self.settings.fit.epochs - 1 or (at_goal and self._prunes_after(epoch))

    def prune(self, state: TrainState, done: int) -> dict[str, float]:
        """Zero the weakest filters of every group, at the rate after `done` epochs.

        Returns how many are zero, the share of them that were not before (churn), and the share of the earlier ones
        that had come back (revived).
        """
        import torch

        settings, total = self.settings, state.fit.epochs
        factor = settings.decay if done < total else 0.0
        before, revived = self.pruned, self._revived()
        self.pruned = {}
        for group in self.groups:
            goal = self.rates[group.name]
            initial = min(settings.initial_rate, goal)
            rate = rate_at(settings.schedule, goal, initial, settings.knee, done, total)
            count = pruned_count(group.size, rate, settings.multiple)
            weakest = torch.argsort(self.scores(group), stable=True)[:count]
            self.pruned[group.name] = weakest.sort().values.cpu()
        for model in [state.model] if state.ema is None else [state.model, state.ema]:
            self.zero(model, factor)
        if settings.revive in ("gradient", "none"):
            self._forget_momentum(state.optimizer)
        return _statistics(before, self.pruned, revived, sum(group.size for group in self.groups))

    @property
    def _zeroed(self) -> dict[str, Tensor]:
        return {name: units for name, units in self.pruned.items() if len(units)}

    def scores(self, group: ChannelGroup) -> Tensor:
        """(size,) importance of every unit of a group."""
        from tersenet.graph.importance import batch_norm_scales, filter_scores, unit_scores
        from tersenet.ops.importance import FILTER_SCORES

        if self.settings.score == "bn_scale":
            return unit_scores(group, batch_norm_scales(self.graph, [group]))
        return unit_scores(group, filter_scores(self.graph, [group], FILTER_SCORES[self.settings.score]))

    def zero(self, model: torch.nn.Module, factor: float = 0.0) -> None:
        """Multiply the pruned filters' weights. Nothing else is touched: not the bias, batch norm or momentum."""
        import torch

        with torch.no_grad():
            for name, axis, places in self._pruned_places():
                weight = model.get_parameter(name)
                places = places.to(weight.device)
                if factor == 0:
                    weight.index_fill_(axis, places, 0)
                else:
                    weight.index_copy_(axis, places, weight.index_select(axis, places) * factor)

    def kept(self) -> Kept:
        """The units left in every group after the last prune."""
        import numpy as np

        return {g.name: np.setdiff1d(np.arange(g.size), self.pruned[g.name].numpy()) for g in self.groups}

    def take_up_zeros(self) -> None:
        """Where `keep: best` brought an earlier epoch's weights back, its zero filters are those to remove."""
        for group in self.groups:
            zeros = (~self.graph.alive(group)).nonzero().flatten()
            count = len(self.pruned[group.name])
            if len(zeros) >= count:
                self.pruned[group.name] = zeros[:count]

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": dict(self.pruned)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.pruned = dict(saved["pruned"])

    def _prunes_after(self, epoch: int) -> bool:
        return epoch % self.settings.interval == 0 or epoch == self.settings.fit.epochs - 1

    def _pruned_places(self) -> list[tuple[str, int, Tensor]]:
        """(weight name, output axis, pruned places along it)."""
        import torch

        found: list[tuple[str, int, Tensor]] = []
        for group in self.groups:
            units = self._zeroed.get(group.name)
            for member in group.members if units is not None else ():
                end = self.graph.ends[member.end]
                if end.role == "produce":
                    found.append((end.tensors[0], end.axis, torch.from_numpy(member.places)[units].flatten()))
        return found

    def _pruned_filters(self) -> list[tuple[Tensor, int, Tensor]]:
        tensors = ((self.graph.tensor(name), axis, places) for name, axis, places in self._pruned_places())
        return [(weight, axis, places.to(weight.device)) for weight, axis, places in tensors]

    def _revived(self) -> int:
        """How many of the filters that were zeroed last are not zero any more."""
        if self.settings.decay != 0:
            return 0
        return sum(int(self.graph.alive(g)[self._zeroed[g.name]].sum()) for g in self.groups if g.name in self._zeroed)

    def _forget_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, axis, places in self._pruned_filters():
            for value in optimizer.state.get(weight, {}).values():
                if getattr(value, "shape", None) == weight.shape:
                    value.index_fill_(axis, places, 0)


def _statistics(before: dict[str, Tensor], now: dict[str, Tensor], revived: int, total: int) -> dict[str, float]:
    pruned = sum(len(units) for units in now.values())
    earlier = sum(len(units) for units in before.values())
    stayed = sum(len(set(before[n].tolist()) & set(units.tolist())) for n, units in now.items() if n in before)
    return {
        "rate": pruned / total,
        "pruned": pruned,
        "churn": (pruned - stayed) / pruned if pruned and before else 0.0,
        "revived": revived / earlier if earlier else 0.0,
    }


def _describe(settings: SoftFilterPruning, graph: ModelGraph, hooks: SoftPruning, context: Context) -> None:
    """Counts beside the paper's, which multiplies by the rate where the network has whole channels."""
    import numpy as np

    shares = np.ones(int(graph.units.of.max()) + 1)
    for group in hooks.groups:
        shares[group.units] = 1 - hooks.rates[group.name]
    whole, left = graph.macs(), graph.macs(hooks.kept())
    context.notes.append(
        f"{whole:,} -> {left:,} MACs, {1 - left / whole:.2%} fewer, counted with whole channels; with fractional "
        f"channels, as papers count, it would be {1 - graph.macs_of(shares) / whole:.2%}"
    )
    for name, reason in graph.frozen_groups().items():
        if not reason.startswith("the network's output"):
            context.notes.append(f"{name} was left whole: {reason}")
