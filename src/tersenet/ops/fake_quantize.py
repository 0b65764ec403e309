"""Uniform symmetric fake quantization: ranges, scales, rounding, and the gradients through it.

A range is a tensor (2, *scales): the smallest and the largest value seen, in the shape that broadcasts against the
values. The range that has seen nothing is empty: (inf, -inf). Nothing here reads a value on the host, so that no GPU
waits and everything can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8


@dataclass(frozen=True)
class Rounding:
    """How one tensor is rounded. Levels -2^(bits - 1) to 2^(bits - 1) - 1, zero is a level.

    bits: At least 2.
    shape: Of the scales: 1 where one scale serves all values of an axis.
    power_of_two: Scales are rounded up to powers of two.
    clip_gradient: Values beyond the last level get no gradient. Without it the gradient is 1 everywhere.
    learned: The scale gets a gradient too.
    """

    bits: int
    shape: tuple[int, ...]
    power_of_two: bool = False
    clip_gradient: bool = False
    learned: bool = False

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def reads_values(self) -> bool:
        """Whether the gradient needs the values that were rounded; without that it is passed on as it is."""
        return self.clip_gradient or self.learned


def empty_range(shape: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """(2, *shape): smallest inf, largest -inf."""
    signs = torch.tensor([math.inf, -math.inf], device=device)
    return signs.view(2, *[1] * len(shape)).expand(2, *shape).clone()


def batch_range(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(2, *shape): smallest and largest of the values that share a scale."""
    if max(shape) == 1:
        low, high = torch.aminmax(values)
        return torch.stack((low, high)).view(2, *shape)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    # Two passes, but each five times as fast as `aminmax` along one axis.
    return torch.stack((values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)))


def moving_range(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """old + momentum * (new - old); the first range is taken as it is."""
    return torch.where(old[:1] > old[1:], new, old + momentum * (new - old))


def joined_range(old: Tensor, new: Tensor) -> Tensor:
    """The range of everything seen."""
    return torch.stack((torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])))


def whole_range(parts: Sequence[Tensor]) -> Tensor:
    """The range of a tensor from those of its parts."""
    low, high = torch.stack([*parts]).unbind(1)
    return torch.stack((low.amin(0), high.amax(0)))


def scale_of(values: Tensor, rounding: Rounding) -> Tensor:
    """Range (2, *shape) -> scales (*shape): largest magnitude / ((2^bits - 1) / 2), at least 1e-8.

    The largest magnitude lies half a step beyond the highest level, as in the Winograd-aware reference.
    """
    largest = values.abs().amax(0)
    scale = (largest / ((2**rounding.bits - 1) / 2)).clamp(min=SMALLEST_SCALE)
    return torch.exp2(torch.log2(scale).ceil()) if rounding.power_of_two else scale


def learned_scale(log2_scale: Tensor, rounding: Rounding) -> Tensor:
    """Scales from their base-2 logarithms, which are what is trained: positive at any value.

    Rounding up to a power of two passes the gradient through. Source: Jain et al., Trained Quantization Thresholds,
    arXiv 1903.08066; Andri et al., Tap-wise quantization, arXiv 2209.12982.
    """
    if rounding.power_of_two:
        log2_scale = log2_scale + (log2_scale.ceil() - log2_scale).detach()
    return torch.exp2(log2_scale)


def round_to_(values: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """In place: clamp(round(values / scale), lowest, highest) * scale; ties go to the even level."""
    return values.div_(scale).round_().clamp_(rounding.lowest, rounding.highest).mul_(scale)


def round_to(values: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """`round_to_` into a new tensor."""
    return (values / scale).round_().clamp_(rounding.lowest, rounding.highest).mul_(scale)


def rounding_gradient(
    values: Tensor, scale: Tensor, rounding: Rounding, gradient: Tensor, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradients for the values and, if it is learned, for the scale.

    For the scale it is sum(gradient * (level - values / scale)) inside and sum(gradient * level) outside of the levels,
    times 1 / sqrt(values per scale * highest level). Source: Esser et al., Learned Step Size Quantization, ICLR 2020.

    own: `values` and `gradient` are overwritten, which takes less than half the time.
    """
    if not rounding.reads_values:
        return gradient, None
    ratio = values.div_(scale) if own else values / scale
    level = ratio.clamp(rounding.lowest, rounding.highest)
    outside = level != ratio
    of_scale = None
    if rounding.learned:
        ratio.masked_fill_(outside, 0)
        of_scale = level.round_().sub_(ratio).mul_(gradient).sum_to_size(scale.shape)
        of_scale = of_scale / math.sqrt(max(1, values.numel() // scale.numel()) * rounding.highest)
    return (gradient.masked_fill_ if own else gradient.masked_fill)(outside, 0), of_scale


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
        return round_to(values, scale, rounding)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
        values, scale, rounding = inputs
        assert isinstance(values, Tensor)
        assert isinstance(scale, Tensor)
        assert isinstance(rounding, Rounding)
        ctx.rounding = rounding  # pyright: ignore[reportAttributeAccessIssue]
        if rounding.reads_values:
            ctx.save_for_backward(values, scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rounding: Rounding = ctx.rounding  # pyright: ignore[reportAttributeAccessIssue]
        if not rounding.reads_values:
            return gradients[0], None, None
        values, scale = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return *rounding_gradient(values, scale, rounding, gradients[0]), None


def fake_quantize(values: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """`round_to` with the straight-through gradient. Keeps the values for backward only if the gradient reads them.

    Differs: the reference's gradient is 1 beyond the last level too; `clip_gradient` is the correct one.
    """
    return _FakeQuantize.apply(values, scale, rounding)  # pyright: ignore[reportReturnType]
