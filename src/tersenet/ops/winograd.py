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
    STAGES,
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
"""A tensor in parts of a few images: number -> part. Each is asked for once, in order."""


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
    y, ranges, _ = _forward(geometry, stages, x, weight, bias, matrices, states)
    return y, tuple(ranges)


def _forward(
    at: Geometry, stages: Stages, x: Tensor, weight: Tensor, bias: Tensor | None, matrices: Matrices,
    states: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """The output, the new ranges and the scales that were used."""
    aa, gg, bb = matrices
    ranges: list[Tensor | None] = [None] * len(STAGES)
    scales: list[Tensor | None] = [None] * len(STAGES)
    n, _, h, w = x.shape
    # Whoever gave NCHW gets NCHW.
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if nhwc else torch.contiguous_format
    at_once = images_at_once(x, weight, at)
    images = split(x, at_once)

    def whole(index: int, values: Tensor, own: bool) -> Tensor:
        """Rounded; in place if `own`."""
        stage, state = stages[index], states[index]
        if stage is None or state is None:
            return values
        scale, ranges[index] = stage.settle(values, state)
        scales[index] = scale
        return (round_to_ if own else round_to)(values, scale, stage.rounding)

    def ready(index: int, make: Part, values: Tensor | None = None) -> Part:
        """The parts rounded in place. To observe their range all are made and held, unless `values` has it."""
        stage, state = stages[index], states[index]
        if stage is None or state is None:
            return make
        held: list[Tensor | None] = []
        found = None
        if stage.observing != "no" and values is not None:
            found = batch_range(values, stage.rounding.shape)
        elif stage.observing != "no":
            seen: list[Tensor] = []
            for i in range(len(images)):
                held.append(part := make(i))
                seen.append(batch_range(part, stage.rounding.shape))
            found = whole_range(seen)
        scale, ranges[index] = stage.settled(found, state, aa.dtype)
        scales[index] = scale
        rounding = stage.rounding

        def rounded(i: int) -> Tensor:
            if not held:
                return round_to_(make(i), scale, rounding)
            part, held[i] = held[i], None
            assert part is not None
            return round_to_(part, scale, rounding)

        return rounded

    with no_autocast(x):
        u = whole(3, transformed(gg, weight_taps(whole(1, weight.to(gg.dtype), own=False), at)), own=True)
        room: list[Tensor | None] = [None]

        def padded(i: int, /) -> Tensor:
            room[0] = padded_image(images[i].to(bb.dtype), at, room[0])
            return room[0]

        if torch.compiler.is_compiling():
            # Written into once and no more: programs exported with gradients fail at the second time.
            one = padded_image(whole(0, x.to(bb.dtype), own=False), at)
            image: Part = lambda _: one  # noqa: E731
        else:
            # Zeros stay zeros: an image can be rounded with its padding.
            image = ready(0, padded, x)
        v = ready(2, lambda i: transformed(bb, input_tiles(image(i), at)))
        product = ready(4, lambda i: products(v(i), u))
        if torch.compiler.is_compiling():
            y = ready(5, lambda i: assembled(aa, product(i), bias, at, (n, h, w), nhwc))(0)
            return y.to(_output_type(x)).contiguous(memory_format=order), ranges, scales
        shape = n, weight.shape[0], at.out(h, 0), at.out(w, 1)
        y = torch.empty(shape, dtype=aa.dtype, device=x.device, memory_format=order)
        places = split(y, at_once)

        def placed(i: int) -> Tensor:
            copy_image(assembled(aa, product(i), bias, at, (images[i].shape[0], h, w), True), places[i])
            return places[i]

        output = ready(5, placed)
        for i in range(len(images)):
            output(i)
    return y.to(_output_type(x)), ranges, scales


def _output_type(x: Tensor) -> torch.dtype:
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: Geometry, stages: Stages, *tensors: Any) -> tuple[Any, ...]:
        x, weight, bias, aa, gg, bb, *states = tensors
        y, ranges, scales = _forward(at, stages, x, weight, bias, Matrices(aa, gg, bb), states)
        ctx.save_for_backward(x, weight, bias, aa, gg, bb, *scales)
        ctx.at, ctx.stages = at, stages
        ctx.mark_non_differentiable(*(found for found in ranges if found is not None))
        return (y, *ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, _, aa, gg, bb, *scales = ctx.saved_tensors
        bias = ctx.saved_tensors[2]
        wanted = ctx.needs_input_grad[2:]
        with no_autocast(x):
            found = backward(ctx.at, ctx.stages, gradients[0], wanted, x, weight, bias, Matrices(aa, gg, bb), scales)
        return (None, None, *found)
