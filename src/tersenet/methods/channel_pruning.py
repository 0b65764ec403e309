"""Channel pruning with reconstruction: keep the channels that explain the next layer best, and fit that layer to them.

Source: He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168.
Differs: the LASSO path is exact and gives exactly the number asked for; the bias of a fitted layer is right (the
published code loses it); batch norm is kept; any network that the graph can trace, with groups of channels that several
layers read; how much each layer loses follows from measured errors; calibration images are training images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, Method
from tersenet.recipe_target import Target, TargetText

if TYPE_CHECKING:
    from tersenet.calibration.items import Costs, Counts, Items
    from tersenet.graph.budget import Rounding
    from tersenet.graph.model import Kept, ModelGraph

Rate = Annotated[float, Field(ge=0, lt=1)]


class ChannelPruning(Method):
    """Choose channels by what they contribute, remove them, and fit the layers that read them by least squares.

    It needs training images, but no labels and no training.
    """

    method: ClassVar[str] = "channel_pruning"

    rate: Rate | None = None
    """Share of the channels removed of every layer. A target goes before."""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """Rates of single layers or stages, by pattern; the first pattern that matches counts. `input:LAYER` stands for
    what a layer reads of a residual trunk in mode `independent`."""
    target: TargetText | None = None
    """This step's own budget (`macs=75%` of the original), for several steps on the way to the recipe's."""
    allocate: Literal["measured", "uniform"] = "measured"
    """How a target is shared out: by each layer's measured damage to the outputs, or the same share of every layer."""
    select: Literal["lasso", "max_response", "first", "random"] = "lasso"
    """Which channels stay: by the LASSO, or by a baseline: absolute weights that read them, the first ones, any."""
    reconstruct: bool = True
    """Fit the layers that lose inputs by least squares."""
    include: tuple[str, ...] = ("*",)
    """Layers to prune: name patterns, `type:conv`, `type:linear`, ..., `position:first`, `input:LAYER`."""
    exclude: tuple[str, ...] = ()
    """Layers to leave whole, by the same patterns. What the network's outputs need is never pruned."""
    residual: Literal["independent", "coupled"] = "coupled"
    """`coupled`: a residual trunk loses channels, chosen for all layers that read them. `independent`: it stays whole,
    and each convolution reads its own sample of it, as published."""
    multiple: int = Field(default=1, ge=1)
    """Leave a multiple of so many channels in every layer."""
    at_least: int = Field(default=1, ge=1)
    """Leave at least so many channels in every layer."""
    images: int = Field(default=1000, ge=1)
    """Training images to calibrate on."""
    positions: int = Field(default=32, ge=1)
    """Output positions sampled of every layer in each image."""

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Leaves the network as it was if anything fails."""
        from tersenet.graph.undo import everything_of

        graph = graph.with_residual("coupled")
        items = self._items(graph)
        fixed = self._fixed(items, context)
        if all(fixed.get(item.name) == item.size for item in items.all):
            context.notes.append("nothing to remove at these rates")
            return
        loader = context.data.train if context.data is not None else None
        if loader is None:
            raise TersenetError("channel_pruning calibrates on training images: give some, such as --data digits")
        undo, notes, fits = everything_of(graph), len(context.notes), len(context.fits)
        try:
            self._carry_out(graph, context, items, fixed)
        except BaseException:
            del context.notes[notes:], context.fits[fits:]
            undo()
            raise

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """No data is read: the same share of every layer goes, and the channels with the weakest filters."""
        import torch

        from tersenet.calibration.choose import made_by

        graph = graph.with_residual("coupled")
        items = self._items(graph)
        left = self._uniform(graph, items, self._fixed(items, context), context)
        if context.target_for(self.target) is not None and self.allocate == "measured":
            context.notes.append("the target was shared out evenly here; a run does it by measured errors")
        kept: Kept = {}
        for item in items.all:
            if left[item.name] < item.size:
                count = left[item.name]
                scores = made_by(graph, item) if item.group is not None else -torch.arange(item.size)
                kept[item.name] = scores.argsort(descending=True, stable=True)[:count].sort().values.numpy()
        if kept:
            self._cut(graph, context, items, kept)

    def _carry_out(self, graph: ModelGraph, context: Context, items: Items, fixed: Counts) -> None:
        from tersenet.calibration.curves import measured_curves
        from tersenet.calibration.images import Images
        from tersenet.calibration.original import Original
        from tersenet.calibration.solver import Solver
        from tersenet.graph.replay import over_kept

        assert context.data is not None
        assert context.data.train is not None
        images = Images(context.data.train, self.images, self.positions, context.seed, context.device)
        solver = Solver(graph, images, self.select, self.reconstruct, context.progress, Original.of(graph, context))
        before, target = graph.macs(), context.target_for(self.target)
        free = [item for item in items.all if item.name not in fixed]
        if target is None or self.allocate == "uniform" or not free:
            left = self._uniform(graph, items, fixed, context)
        else:
            from tersenet.calibration.allocation import allocate

            self._uniform(graph, items, fixed, context)  # out of reach is said before anything is measured
            costs, original = self._costs(graph, items, context)
            left = allocate(costs, measured_curves(solver, free), target, original, self._rounding(), fixed)
        solver.run(items.all, items.readers, left)
        if not over_kept(graph, solver.gone):
            # Elsewhere the zeros count in means over channels, which are then not what they become.
            context.masked = context.evaluate()
        self._cut(graph, context, items, solver.kept)
        context.notes.append(
            f"{before:,} MACs before; calibrated on {images.seen()} training images (seed {context.seed}), "
            f"{self.positions} positions of each layer's outputs in each"
        )
        context.fits += solver.fits
        context.notes += solver.notes
        for item in items.all:
            if not item.readers:
                context.notes.append(
                    f"{item.name}: chosen by its filters' norm, as no layer that reads it can be fitted"
                )

    def _items(self, graph: ModelGraph) -> Items:
        from tersenet.calibration.items import find_items

        return find_items(graph, self.include, self.exclude, sample=self.residual == "independent")

    def _rounding(self) -> Rounding:
        from tersenet.graph.budget import Rounding

        return Rounding(self.multiple, self.at_least)

    def _fixed(self, items: Items, context: Context) -> Counts:
        """Item -> units left where a rate says so.

        Raises:
            TersenetError: a pattern that matches nothing, or neither rate nor target for what is left.
        """
        from tersenet.calibration.allocation import uniform
        from tersenet.calibration.items import named_rates

        rates = named_rates(items, self.rates)
        free = [item for item in items.all if item.name not in rates]
        if free and context.target_for(self.target) is None:
            if self.rate is None:
                raise TersenetError("channel_pruning needs a rate (share of channels removed) or a target (macs=50%)")
            rates |= {item.name: self.rate for item in free}
        left: Counts = {}
        for item in items.all:
            if item.name in rates:
                left |= uniform({item.name: item.size}, rates[item.name], self._rounding())
        return left

    def _costs(self, graph: ModelGraph, items: Items, context: Context) -> tuple[Costs, int]:
        from tersenet.calibration.items import Costs

        kind = (context.target_for(self.target) or Target("macs", 1.0, relative=True)).kind
        return Costs(graph, items.all, kind), (context.original_macs if kind == "macs" else context.original_params)

    def _uniform(self, graph: ModelGraph, items: Items, fixed: Counts, context: Context) -> Counts:
        from tersenet.calibration.allocation import uniform_within

        target = context.target_for(self.target)
        if target is None or len(fixed) == len(items.all):
            return fixed
        costs, original = self._costs(graph, items, context)
        return uniform_within(costs, target, original, self._rounding(), fixed)

    def _cut(self, graph: ModelGraph, context: Context, items: Items, kept: Kept) -> None:
        from tersenet.calibration.cut import cut

        sampled = {
            item.readers[0].layer: kept[item.name] for item in items.all if item.group is None and item.name in kept
        }
        groups = {item.group.name: kept[item.name] for item in items.all if item.group and item.name in kept}
        context.equality = cut(graph, groups, sampled)
