"""Two-dimensional convolution by Winograd's F(m, r), as t * t independent matrix products, with fake quantization.

`winograd_stages.py` has the stages and their shapes. For backward only the input, the weight and small tensors are
kept: all else is computed again. Both directions take a few images at a time, so that what is transient stays in the
cache; a tensor whose range is observed is held, since nothing of it can be rounded before all of it is there.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; the stages that are quantized,
from Fernandez-Marques et al., Searching for Winograd-aware Quantized Networks, MLSys 2020, arXiv 2002.10711.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tersenet.ops.fake_quantize import batch_range, round_to, round_to_, whole_range
from tersenet.ops.winograd_backward import backward
from tersenet.ops.winograd_stages import (
    INPUT,
    INPUT_WINOGRAD,
    OUTPUT,
    PRODUCT,
    STAGES,
    WEIGHT,
    WEIGHT_WINOGRAD,
    Matrices,
    Stage,
    Stages,
    assembled,
    images_at_once,
    kronecker,
    no_autocast,
    products,
    split,
    transformed,
)
from tersenet.ops.winograd_tiles import Geometry, copy_image, input_tiles, padded_image, weight_taps

__all__ = [
    "STAGES", "Matrices", "Stage", "Stages", "assembled", "kronecker", "products", "transformed", "winograd_conv2d",
]  # fmt: skip

Part = Callable[[int], Tensor]
"""A tensor in parts of a few images: number of the part -> the part. Each is asked for once, in order."""


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    matrices: Matrices,
    geometry: Geometry,
    stages: Stages | None = None,
    states: Sequence[Tensor | None] = (None,) * len(STAGES),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The convolution of x (N, C, H, W), and the new range of each stage that observes.

    Computed in the matrices' type, under autocast too; the output has the type a convolution's would have.
    Every argument that is a float tensor gets a gradient, once: there is no second derivative.

    Raises: TersenetError if the padded map is smaller than the filter.
    """
    stages = stages or Stages()
    tensors = (x, weight, bias, *matrices, *states)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        outcome: tuple[Any, ...] = _Winograd.apply(geometry, stages, *tensors)  # pyright: ignore[reportAssignmentType]
        return outcome[0], outcome[1:]
    y, rounded = _forward(geometry, stages, x, weight, bias, matrices, states)
    return y, tuple(rounded.ranges)


def _forward(
    geometry: Geometry, stages: Stages, x: Tensor, weight: Tensor, bias: Tensor | None, matrices: Matrices,
    states: Sequence[Tensor | None],
) -> tuple[Tensor, _Rounded]:  # fmt: skip
    """The output, and what it was rounded by."""
    aa, gg, bb = matrices
    n, _, h, w = x.shape
    # Whoever gave NCHW gets NCHW.
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if nhwc else torch.contiguous_format
    at_once = images_at_once(x, weight, geometry)
    images = split(x, at_once)
    rounded = _Rounded(stages, states, aa.dtype, len(images))
    with no_autocast(x):
        taps = weight_taps(rounded.whole(WEIGHT, weight.to(gg.dtype), own=False), geometry)
        u = rounded.whole(WEIGHT_WINOGRAD, transformed(gg, taps), own=True)
        room: list[Tensor | None] = [None]

        def padded(i: int, /) -> Tensor:
            """Into the same memory each time: a part is read before the next one is asked for."""
            room[0] = padded_image(images[i].to(bb.dtype), geometry, room[0])
            return room[0]

        if torch.compiler.is_compiling():
            # Written into once and no more: programs exported with gradients fail at the second time.
            one = padded_image(rounded.whole(INPUT, x.to(bb.dtype), own=False), geometry)
            image: Part = lambda _: one  # noqa: E731
        else:
            # Zeros stay zeros: an image can be rounded with its padding.
            image = rounded.parts(INPUT, padded, x)
        v = rounded.parts(INPUT_WINOGRAD, lambda i: transformed(bb, input_tiles(image(i), geometry)))
        product = rounded.parts(PRODUCT, lambda i: products(v(i), u))
        if torch.compiler.is_compiling():
            # There is one part only, and nothing has to be put together.
            y = rounded.parts(OUTPUT, lambda i: assembled(aa, product(i), bias, geometry, (n, h, w), nhwc))(0)
            return y.to(_output_type(x)).contiguous(memory_format=order), rounded
        shape = n, weight.shape[0], geometry.out(h, 0), geometry.out(w, 1)
        y = torch.empty(shape, dtype=aa.dtype, device=x.device, memory_format=order)
        places = split(y, at_once)

        def placed(i: int) -> Tensor:
            part = assembled(aa, product(i), bias, geometry, (images[i].shape[0], h, w), nhwc=True)
            copy_image(part, places[i])
            return places[i]

        output = rounded.parts(OUTPUT, placed)
        for i in range(len(images)):
            output(i)
    return y.to(_output_type(x)), rounded


class _Rounded:
    """Rounds the tensors of one pass. Collects the scale of each stage, and its new range where that is observed.

    dtype: of the scales. count: into how many parts the images are divided.
    """

    def __init__(self, stages: Stages, states: Sequence[Tensor | None], dtype: torch.dtype, count: int) -> None:
        self.stages, self.states, self.dtype, self.count = stages, states, dtype, count
        self.ranges: list[Tensor | None] = [None] * len(STAGES)
        self.scales: list[Tensor | None] = [None] * len(STAGES)

    def whole(self, index: int, values: Tensor, own: bool) -> Tensor:
        """A tensor that is there as a whole; rounded in place if it is `own`."""
        stage, state = self.stages[index], self.states[index]
        if stage is None or state is None:
            return values
        scale, self.ranges[index] = stage.settle(values, state)
        self.scales[index] = scale
        return (round_to_ if own else round_to)(values, scale, stage.rounding)

    def parts(self, index: int, make: Part, values: Tensor | None = None) -> Part:
        """The parts that `make` makes, rounded in place.

        Where their range is observed, all of them are made now and held, unless `values` has the same range.
        """
        stage, state = self.stages[index], self.states[index]
        if stage is None or state is None:
            return make
        held: list[Tensor | None] = []
        found = None
        if stage.observing != "no" and values is not None:
            found = batch_range(values, stage.rounding.shape)
        elif stage.observing != "no":
            seen: list[Tensor] = []
            for i in range(self.count):
                held.append(part := make(i))
                seen.append(batch_range(part, stage.rounding.shape))
            found = whole_range(seen)
        scale, self.ranges[index] = stage.settled(found, state, self.dtype)
        self.scales[index] = scale
        rounding = stage.rounding

        def rounded(i: int) -> Tensor:
            if not held:
                return round_to_(make(i), scale, rounding)
            part, held[i] = held[i], None
            assert part is not None
            return round_to_(part, scale, rounding)

        return rounded


def _output_type(x: Tensor) -> torch.dtype:
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: Geometry, stages: Stages, *tensors: Any) -> tuple[Any, ...]:
        x, weight, bias, aa, gg, bb, *states = tensors
        y, rounded = _forward(geometry, stages, x, weight, bias, Matrices(aa, gg, bb), states)
        ctx.save_for_backward(x, weight, bias, aa, gg, bb, *rounded.scales)
        ctx.geometry, ctx.stages = geometry, stages
        ctx.mark_non_differentiable(*(found for found in rounded.ranges if found is not None))
        return (y, *rounded.ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, aa, gg, bb, *scales = ctx.saved_tensors
        matrices, wanted = Matrices(aa, gg, bb), ctx.needs_input_grad[2:]
        with no_autocast(x):
            found = backward(ctx.geometry, ctx.stages, gradients[0], wanted, x, weight, bias, matrices, scales)
        return (None, None, *found)
