"""Winograd-aware quantized networks: convolutions by Winograd's F(m, r), trained with the error that this brings.

`winograd` swaps the layers and calibrates them, without training; `winograd_aware` trains then.

Source: Fernandez-Marques et al., Searching for Winograd-aware Quantized Networks, MLSys 2020, arXiv 2002.10711; one
scale per tap from Andri et al., arXiv 2209.12982.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, Method, TrainingMethod
from tersenet.nn.winograd_settings import Bits, Flex, Points, Quantization, Quantizer, WinogradSettings
from tersenet.train.hooks import Hooks, TrainState

if TYPE_CHECKING:
    from tersenet.graph.convolutions import Convolution, Plan
    from tersenet.graph.model import ModelGraph

Tile = Annotated[int, Field(ge=2, le=8)] | Literal["auto", "direct"]


class _Swapping(Method):
    """What both methods share: which layers become what."""

    tile: Tile = 4
    """m of F(m x m, r x r): 2, 4 or 6. Where it is larger than the map, the next smaller one. `auto`: for each layer
    that with the fewest products on its map, 6 only without quantization or from 16 bits on. `direct`: ordinary
    convolutions, quantized: the baseline."""
    tiles: dict[str, Tile] = Field(default_factory=dict)
    """Tiles of single layers, by name pattern; the first pattern that matches counts."""
    bits: Bits | None = 8
    """Of every quantized tensor; null computes in floating point."""
    quantizers: Literal["tapwise", "reference"] = "tapwise"
    """`tapwise`: one scale per tap in the Winograd domain, exact transforms. `reference`: the paper's nine quantizers
    with one scale each, the transforms' among them."""
    product_bits: Bits | None = None
    """More bits for the sum of products, with `tapwise`."""
    power_of_two: bool = False
    """The taps' scales are powers of two, with `tapwise`."""
    scale: Literal["range", "learned"] = "range"
    """`range`: scales follow the moving range of the values. `learned`: they are trained."""
    points: Points | None = None
    """The transforms' points, see `tersenet winograd info F4`. Default: `balanced`, for `quantizers: reference` the
    reference's where it has some: F(2, 3), F(4, 3) and F(6, 3)."""
    flex: Flex = "static"
    """Whether the transforms are trained: `static`, `full` (the paper's flex), `diagonal`, `points`. The last two stay
    exact convolutions."""
    include: tuple[str, ...] = ("*",)
    """Layers to swap, by name pattern, `position:first`, `position:last`, `type:conv` or `type:grouped`. 1x1 and
    depthwise convolutions, and without `strided` those with a stride, are never swapped, but quantized beside."""
    exclude: tuple[str, ...] = ("position:first",)
    """Layers that stay as they are, in floating point; by default the first, as in the paper."""
    strided: bool = False
    """Swap convolutions with a stride too: fewer products, but not many."""
    others: Literal["quantize", "float"] = "quantize"
    """What becomes of the convolutions that can't be swapped, if there are `bits`: input, weight and output are
    quantized, or nothing."""
    calibration_batches: int = Field(default=8, ge=1)
    """Training batches that the quantizers' first ranges are taken from."""

    @model_validator(mode="after")
    def _fits_together(self) -> _Swapping:
        tapwise = self.bits is not None and self.quantizers == "tapwise"
        if not tapwise and (self.product_bits is not None or self.power_of_two):
            raise ValueError("product_bits and power_of_two need `quantizers: tapwise` and bits")
        if self.bits is None and "direct" in (self.tile, *self.tiles.values()):
            raise ValueError("`direct` without bits is what the network is already: give bits, or a tile")
        return self

    def apply(self, graph: ModelGraph, context: Context) -> None:
        plan = self.plan(graph, self.quantization)
        train = context.data.train if context.data is not None else None
        if self.bits is not None and (train is None or len(train) == 0):
            raise TersenetError(
                f"{self.method} takes the quantizers' ranges from training images: give some, such as --data digits, "
                "and at least a batch of them, or `bits: null`"
            )
        for edit in plan.edits:
            graph.apply(edit)
        images = 0
        if self.bits is not None and train is not None:
            from tersenet.train.ranges import calibrate_ranges

            trains = isinstance(self, TrainingMethod)
            images = calibrate_ranges(
                graph.model, train, self.calibration_batches, device=context.device, for_training=trains
            )
            check_layers(graph.model)
        context.notes += [*plan.notes(), self._origin(plan, images)]

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """Without quantizers: no image is read, so they have no ranges."""
        context.notes += self.plan(graph, self.quantization).notes()
        for edit in self.plan(graph, None).edits:
            graph.apply(edit)

    @property
    def quantization(self) -> Quantization | None:
        """Of the Winograd layers."""
        if self.bits is None:
            return None
        if self.quantizers == "reference":
            made = Quantization.reference(self.bits)
        else:
            made = Quantization.tapwise(self.bits, self.product_bits, self.power_of_two)
        return self._with_scales(made)

    def _with_scales(self, made: Quantization) -> Quantization:
        """The transforms have so few values that their ranges are enough."""
        given = {name: getattr(made, name) for name in type(made).model_fields if name != "transforms"}
        update = {name: q.model_copy(update={"scale": self.scale}) for name, q in given.items() if q is not None}
        return made.model_copy(update=update)

    def plan(self, graph: ModelGraph, quantization: Quantization | None) -> Plan:
        """What becomes of every convolution.

        Raises: TersenetError for a pattern that matches nothing, a tile asked for by name that is larger than the map,
            points that don't fit, or if nothing is left to do.
        """
        from tersenet.graph.convolutions import Plan, convolutions, tags
        from tersenet.graph.select import check_patterns, matches_any

        found, left = convolutions(graph, grouped=True)
        known = tags({conv.name: conv.module for conv in found})
        plan = Plan(left=left)
        check_patterns([*self.include, *self.exclude, *self.tiles], [*known, *left])
        for conv in found:
            plan.before += conv.multiplications()
            own = known[conv.name]
            if matches_any(own, self.exclude) or not matches_any(own, self.include):
                plan.left[conv.name] = "left out by include or exclude"
                plan.products += conv.multiplications()
                continue
            named: Tile | None = next(
                (tile for pattern, tile in self.tiles.items() if matches_any(own, [pattern])), None
            )
            self._place(plan, conv, named, quantization)
        if not plan.tiles and not plan.direct:
            reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in plan.reasons().items())
            raise TersenetError(f"no layer is left for {self.method} ({reasons or 'the network has no convolution'})")
        return plan

    def _place(self, plan: Plan, conv: Convolution, named: Tile | None, quantization: Quantization | None) -> None:
        from tersenet.graph.edits import Quantize, Winograd

        wanted = self.tile if named is None else named
        reason = conv.hindrance(self.strided)
        if reason is None and wanted != "direct":
            tile = self._tile(conv, wanted, named is not None)
            settings = WinogradSettings(
                tile=tile, points=self._points(conv, tile), flex=self.flex, quantization=quantization
            )
            plan.edits.append(Winograd(module=conv.name, settings=settings))
            plan.tiles[conv.name] = tile
            plan.products += conv.multiplications(tile)
            if isinstance(wanted, int) and tile != wanted:
                plan.smaller[conv.name] = tile
        else:
            plan.products += conv.multiplications()
            if self.bits is not None and (wanted == "direct" or self.others == "quantize"):
                plan.direct[conv.name] = reason or "direct"
                if quantization is not None:
                    one = Quantizer(bits=self.bits)
                    direct = self._with_scales(Quantization(input=one, weight=one, output=one))
                    plan.edits.append(Quantize(module=conv.name, quantization=direct))
            else:
                plan.left[conv.name] = reason or "direct"

    def _tile(self, conv: Convolution, wanted: Tile, named: bool) -> int:
        side = min(conv.sides)
        if isinstance(wanted, int):
            if wanted <= side:
                return wanted
            if named:
                raise TersenetError(
                    f"tile {wanted} for {conv.name} is larger than its map of {'x'.join(map(str, conv.sides))}: "
                    f"give it one of at most {side}, or `auto`"
                )
            return max(m for m in (2, 4, 6) if m <= side)
        exact = self.bits is None or self.bits >= 16
        return min((m for m in (2, 4, 6) if m <= side and (exact or m < 6)), key=conv.multiplications)

    def _points(self, conv: Convolution, tile: int) -> str | tuple[str, ...]:
        """Raises: TersenetError, naming the layer, for points that F(m, r) can't take or float32 can't compute with."""
        from tersenet.nn.winograd_transforms import LARGEST_CONDITION
        from tersenet.ops.cook_toom import cook_toom

        # The reference has no other transforms than these.
        faithful = self.quantizers == "reference" and self.bits is not None and conv.taps == 3 and tile in (2, 4, 6)
        points = self.points or ("reference" if faithful else "balanced")
        try:
            conditions = cook_toom(tile, conv.taps, points).condition_numbers()
        except TersenetError as error:
            raise TersenetError(f"{conv.name} by F({tile}, {conv.taps}): {error}") from None
        # Also false for NaN.
        if not max(conditions.values()) < LARGEST_CONDITION:
            raise TersenetError(
                f"{conv.name} by F({tile}, {conv.taps}): with the points {points} the transforms are all but singular "
                f"(condition number {max(conditions.values()):.3g}, must be below {LARGEST_CONDITION:.0e}); take "
                "points nearer to 1 and -1, or a smaller tile"
            )
        return points

    def _origin(self, plan: Plan, images: int) -> str:
        """What is the network's own, and what is fresh."""
        fresh = [f"the quantizers' ranges, from {images} training images"] if images else []
        if self.flex != "static" and plan.tiles:
            fresh.append(f"the transforms of {len(plan.tiles)} layers, which training changes ({self.flex})")
        return f"kept as they were: all weights, biases and norms; fresh: {' and '.join(fresh) or 'nothing'}"


class WinogradSwap(_Swapping):
    """Swap convolutions for Winograd ones and calibrate their quantizers, without training.

    Good for `F2` at 8 bits, and in floating point; F4 and F6 at 8 bits want `winograd_aware`.
    """

    method: ClassVar[str] = "winograd"


class WinogradAware(_Swapping, TrainingMethod):
    """Swap convolutions for Winograd ones, calibrate, and train with the quantization and numerical error in the loss.

    From random weights it is the paper's training; from a trained network its adaptation.

    Differs: any network, size, padding, stride and group; transforms and learned scales have no weight decay; a
    calibration over all of `calibration_batches` is in place of the warm-up flag, and nothing follows the test images.
    """

    method: ClassVar[str] = "winograd_aware"

    transforms_lr: float = Field(default=1.0, gt=0)
    """Learning rate of trained transforms and scales, as a multiple of `fit`'s."""

    def hooks(self, graph: ModelGraph, context: Context) -> WinogradTraining:
        return WinogradTraining(self.transforms_lr)

    def finish(self, graph: ModelGraph, context: Context, hooks: Hooks) -> None:
        """Refuse what training made unusable."""
        check_layers(graph.model)


class WinogradTraining(Hooks):
    """The transforms' own learning rate, and a look at every layer after each epoch."""

    def __init__(self, transforms_lr: float) -> None:
        self.transforms_lr = transforms_lr

    def before_training(self, state: TrainState) -> None:
        for group in state.optimizer.param_groups:
            if group.get("name") == "undecayed":
                group["lr_factor"] = self.transforms_lr

    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        check_layers(state.model)
        return {}


def check_layers(model: Any) -> None:
    """Raises: TersenetError, naming the layer, for transforms that are singular or ranges that are not finite."""
    from tersenet.nn.quantized import QuantizedConv2d
    from tersenet.nn.winograd import WinogradConv2d

    for name, module in model.named_modules():
        if isinstance(module, (WinogradConv2d, QuantizedConv2d)):
            module.check(name)
