"""What spatial and channel decomposition share: their settings, and the order of things."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, Method
from tersenet.recipe_target import Target, TargetText

if TYPE_CHECKING:
    from tersenet.calibration.items import Counts
    from tersenet.calibration.low_rank_layers import Candidates
    from tersenet.graph.model import ModelGraph

Rate = Annotated[float, Field(ge=0, lt=1)]
Rank = Annotated[int, Field(ge=1)]


class LowRank(Method):
    """Split convolutions in two of lower rank, each pair fitted to the original's responses."""

    form: ClassVar[Literal["spatial", "channel"]]

    rate: Rate | None = None
    """Share of the MACs removed of every layer, at least. A target goes before."""
    ranks: dict[str, Rank] = Field(default_factory=dict)
    """Ranks of single layers, by name pattern; the first pattern that matches counts, and a target leaves them alone.
    A rank that saves nothing leaves its layer whole."""
    target: TargetText | None = None
    """This step's own budget (`macs=60%` of the original), for several steps on the way to the recipe's."""
    allocate: Literal["measured", "energy", "uniform"] = "measured"
    """How a target is shared out: by each layer's measured damage to the outputs; by the energy of the responses, as in
    Zhang et al., which needs no runs of the whole network; or the same share of every layer."""
    relu: bool = True
    """Where a ReLU follows, fit what comes out behind it. Otherwise plain least squares."""
    include: tuple[str, ...] = ("*",)
    """Convolutions to split: name patterns, `type:conv`, `position:first`, `position:last`."""
    exclude: tuple[str, ...] | None = None
    """Convolutions to leave whole, by the same patterns; null leaves out the first, which costs little."""
    multiple: int = Field(default=1, ge=1)
    """Ranks that a rate or a target gives are multiples of this."""
    images: int = Field(default=1000, ge=1)
    """Training images to calibrate on."""
    positions: int = Field(default=10, ge=1)
    """Output positions sampled of every layer in each image."""

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Restores the network if anything fails."""
        from tersenet.graph.undo import everything_of

        graph = graph.with_residual("coupled")
        found, given, notes = self._asked(graph, context)
        if not _something(found, given):
            context.notes += [*notes, *found.notes(), "nothing to split"]
            return
        if context.data is None or context.data.train is None:
            raise TersenetError(f"{self.method} calibrates on training images: give some, such as --data digits")
        undo, noted, fitted = everything_of(graph), len(context.notes), len(context.fits)
        try:
            self._carry_out(graph, context, found, given)
        except BaseException:
            del context.notes[noted:], context.fits[fitted:]
            undo()
            raise
        context.notes += [*notes, *found.notes()]

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """No data is read: a target takes the same share of every layer, and the pairs have no weights."""
        from tersenet.graph.edits import Split

        graph = graph.with_residual("coupled")
        found, given, notes = self._asked(graph, context)
        ranks = self._uniform(graph, found, given, context)
        if context.target_for(self.target) is not None and self.allocate != "uniform":
            notes.append("the target was shared out evenly here; a run does it by errors")
        for layer in found.chosen:
            if ranks[layer.name] < layer.size:
                graph.apply(Split(module=layer.name, form=self.form, rank=ranks[layer.name]))
        context.notes += [*notes, *found.notes()]

    def find(self, graph: ModelGraph) -> Candidates:
        """The layers that can be split."""
        from tersenet.calibration.low_rank_layers import find_splittable

        return find_splittable(graph, self.form, self.include, self.exclude, pointwise=False)

    def _asked(self, graph: ModelGraph, context: Context) -> tuple[Candidates, Counts, list[str]]:
        """The layers, and the ranks of those for which one is given, with what is to be said of them.

        Raises:
            TersenetError: neither rank, rate nor target for a layer, or a target out of reach.
        """
        from tersenet.calibration.low_rank_layers import ranks_of

        found = self.find(graph)
        target = context.target_for(self.target)
        given, notes = ranks_of(found, None if target is not None else self.rate, self.ranks, self.multiple)
        if target is None and len(given) < len(found.chosen):
            if not self.ranks:
                raise TersenetError(
                    f"{self.method} needs a rate (share of the MACs removed), ranks or a target (macs=50%)"
                )
            given = {layer.name: given.get(layer.name, layer.size) for layer in found.chosen}
        self._uniform(graph, found, given, context)  # out of reach is said before anything is measured
        return found, given, notes

    def _uniform(self, graph: ModelGraph, found: Candidates, given: Counts, context: Context) -> Counts:
        from tersenet.calibration.allocation import uniform_within
        from tersenet.calibration.low_rank_layers import RankCosts
        from tersenet.graph.budget import Rounding

        target = context.target_for(self.target)
        if target is None:
            return given
        costs = RankCosts(graph, found.chosen, target.kind)
        return uniform_within(costs, target, self._original(target, context), Rounding(self.multiple), given)

    def _original(self, target: Target, context: Context) -> int:
        return context.original_macs if target.kind == "macs" else context.original_params

    def _carry_out(self, graph: ModelGraph, context: Context, found: Candidates, given: Counts) -> None:
        from tersenet.calibration.allocation import allocate
        from tersenet.calibration.images import Images
        from tersenet.calibration.low_rank_layers import RankCosts
        from tersenet.calibration.low_rank_solver import Splitter
        from tersenet.calibration.original import Original
        from tersenet.graph.budget import Rounding

        assert context.data is not None
        assert context.data.train is not None
        images = Images(context.data.train, self.images, self.positions, context.seed, context.device)
        splitter = Splitter(graph, self.form, images, self.relu, context.progress, Original.of(graph, context))
        before, target = graph.macs(), context.target_for(self.target)
        free = [layer for layer in found.chosen if layer.name not in given]
        if target is None or self.allocate == "uniform" or not free:
            ranks = self._uniform(graph, found, given, context)
        else:
            costs, original = RankCosts(graph, found.chosen, target.kind), self._original(target, context)
            ranks = allocate(
                costs, splitter.curves(free, self.allocate), target, original, Rounding(self.multiple), given
            )
        splitter.run(found.chosen, ranks)
        context.masked = context.evaluate()
        context.equality = splitter.carry_out()
        context.notes.append(
            f"{before:,} MACs before, {graph.macs():,} after; calibrated on {images.seen()} training images (seed "
            f"{context.seed}), {self.positions} positions of each layer's outputs in each"
        )
        context.notes += splitter.notes
        context.fits += splitter.fits


def _something(found: Candidates, given: Counts) -> bool:
    """Whether any layer is to be split; where no rank is given, a target decides."""
    return any(given.get(layer.name, 0) < layer.size for layer in found.chosen)
