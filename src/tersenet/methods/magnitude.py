"""Prune the least important channels, once and without training: the plain method, and the one to copy for your own.

Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv 1608.08710, for the L1 norm; the sources of
the other scores are in `tersenet.ops.importance` and `tersenet.graph.importance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, Method
from tersenet.recipe_target import TargetText

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tersenet.graph.budget import Ranking
    from tersenet.graph.importance import EndScores
    from tersenet.graph.model import Kept, ModelGraph
    from tersenet.graph.units import ChannelGroup

Rate = Annotated[float, Field(ge=0, lt=1)]


class Magnitude(Method):
    """Score every channel, remove the weakest, prove that nothing else changed.

    It does not train: put a `train` step behind it, and several pairs of both for iterative pruning.
    """

    method: ClassVar[str] = "magnitude"

    rate: Rate | None = None
    """Share of the channels removed: of every layer, or with `scope: global` of all together. A target goes before."""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """Rates of single layers or stages, by pattern; the first pattern that matches counts."""
    target: TargetText | None = None
    """This step's own budget (`macs=75%` of the original), for several steps on the way to the recipe's."""
    score: Literal["l1", "l2", "fpgm", "bn_scale", "taylor", "activation", "apoz", "random"] = "l1"
    """What makes a channel important. `taylor`, `activation` and `apoz` look at training images."""
    scope: Literal["local", "global"] = "local"
    """`local`: the same share of every layer. `global`: the weakest channels of the network, wherever they are."""
    normalise: Literal["mean", "max", "lamp", "none"] = "mean"
    """How `scope: global` makes the scores of different layers comparable."""
    include: tuple[str, ...] = ("*",)
    """Layers to prune: name patterns, `type:conv`, `type:linear`, ..., `position:first`, `position:last`."""
    exclude: tuple[str, ...] = ()
    """Layers to leave whole, by the same patterns. What the network's outputs need is never pruned."""
    residual: Literal["independent", "coupled"] = "coupled"
    """`coupled`: all layers that write to a trunk keep the same channels, and the trunk shrinks. `independent`: each
    block keeps its own channels, added into the full-width trunk."""
    multiple: int = Field(default=1, ge=1)
    """Leave a multiple of so many channels in every layer."""
    at_least: int = Field(default=1, ge=1)
    """Leave at least so many channels in every layer."""
    constants: Literal["auto", "exact", "zero"] = "zero"
    """What batch norm emits for removed filters: silenced (`zero`), compensated exactly, or exact where possible."""
    batches: int = Field(default=8, ge=1)
    """Training batches that `taylor`, `activation` and `apoz` look at."""
    recalibrate_bn: int = Field(default=0, ge=0)
    """Training batches from which batch norm statistics are estimated anew after pruning."""

    def apply(self, graph: ModelGraph, context: Context) -> None:
        loader = context.data.train if context.data is not None else None
        if self.recalibrate_bn and loader is None:
            raise TersenetError("recalibrate_bn needs training images: give some, such as --data digits, or leave it 0")
        self._prune(graph, context)
        if loader is not None and self.recalibrate_bn:
            from tersenet.train.recalibrate import recalibrate_bn

            recalibrate_bn(graph.model, loader, self.recalibrate_bn, device=context.device)

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """A dry run reads no data: where the score needs some, channels are counted by their L1 norms."""
        blind = context.data is None and self.score in ("taylor", "activation", "apoz")
        if blind:
            context.notes.append(f"{self.score} needs data; these counts are by l1, and may differ with scope: global")
        (self.model_copy(update={"score": "l1"}) if blind else self)._prune(graph, context)

    def _prune(self, graph: ModelGraph, context: Context) -> None:
        from tersenet.graph.compact import compact
        from tersenet.graph.select import left_whole, select_groups

        graph = graph.with_residual(self.residual)
        groups = select_groups(graph, self.include, self.exclude)
        kept = self._kept(graph, groups, context)
        before, after = graph.macs(), graph.macs(kept)
        units, left = sum(group.size for group in groups), sum(len(places) for places in kept.values())
        notes = [f"{units - left} of {units} channels removed by {self.score}; {before:,} -> {after:,} MACs"]
        notes += [f"{', '.join(names)} left whole: {why}" for why, names in left_whole(graph, groups).items()]
        done = compact(graph, kept, self.constants)
        if done.zeroed and self.constants != "zero":
            notes.append(f"batch norm and bias of the removed filters of {', '.join(done.zeroed)} were silenced")
        context.equality = done.equality
        context.notes += notes

    def _kept(self, graph: ModelGraph, groups: list[ChannelGroup], context: Context) -> Kept:
        """What is left of every group.

        Raises:
            TersenetError: neither rate nor target, a target out of reach, or scores that can't be had.
        """
        from tersenet.graph.budget import Rounding, kept_at, kept_within, rank_globally, rank_locally
        from tersenet.graph.select import named_rates

        target = context.target_for(self.target)
        named = named_rates(graph, groups, self.rates)
        free = [group.name for group in groups if group.name not in named]
        if free and target is None and self.rate is None:
            raise TersenetError("magnitude needs a rate (share of channels removed) or a target (macs=50%)")
        scores = self.scores(graph, groups, context)
        rounding = Rounding(self.multiple, self.at_least)
        fixed: Kept = {}
        for name, rate in named.items():
            fixed |= kept_at(rank_locally({name: scores[name]}), rate, rounding)
        rank = rank_globally if self.scope == "global" else rank_locally
        ranking: Ranking = rank({name: scores[name] for name in free})
        if target is None:
            return fixed | kept_at(ranking, self.rate or 0.0, rounding)
        original = context.original_macs if target.kind == "macs" else context.original_params
        return fixed | kept_within(graph, ranking, target, original, rounding, fixed)

    def scores(self, graph: ModelGraph, groups: list[ChannelGroup], context: Context) -> dict[str, NDArray[np.float64]]:
        """Group name -> (size,) importance of its units."""
        from tersenet.graph.importance import unit_scores
        from tersenet.ops.importance import NORMALISATIONS

        ends = self._end_scores(graph, groups, context)
        scores = {group.name: unit_scores(group, ends).double() for group in groups}
        if self.scope == "global":
            scores = {name: NORMALISATIONS[self.normalise](values) for name, values in scores.items()}
        return {name: values.cpu().numpy() for name, values in scores.items()}

    def _end_scores(self, graph: ModelGraph, groups: list[ChannelGroup], context: Context) -> EndScores:
        from tersenet.graph import importance
        from tersenet.ops.importance import ACTIVATION_SCORES, FILTER_SCORES
        from tersenet.train.calibrate import CalibrationLosses
        from tersenet.train.distributed import broadcast

        if self.score in FILTER_SCORES:
            return importance.filter_scores(graph, groups, FILTER_SCORES[self.score])
        if self.score == "bn_scale":
            return importance.batch_norm_scales(graph, groups)
        if self.score == "random":
            return importance.random_scores(graph, groups, context.seed)
        losses = CalibrationLosses(graph.model, context.data, self.batches, context.device)
        if self.score == "taylor":
            scores = importance.taylor_scores(graph, groups, losses)
        else:
            scores = importance.activation_scores(graph, groups, losses, ACTIVATION_SCORES[self.score])
        # Every process saw its own share of the images; all must remove the same channels.
        broadcast(scores.values())
        context.notes.append(f"{self.score} was measured on {losses.images} training images")
        return scores
