"""What F(m, r) costs in accuracy: the error of one layer on random data, in float32 and quantized."""

from __future__ import annotations

import torch

from tersenet.ops.cook_toom import Matrix, Transforms
from tersenet.ops.fake_quantize import Rounding, empty_range
from tersenet.ops.winograd import Matrices, Stage, Stages, kronecker, winograd_conv2d
from tersenet.ops.winograd_tiles import Geometry


def layer_error(
    transforms: Transforms, bits: int | None = None, per_tap: bool = True, channels: int = 64, seed: int = 0
) -> float:
    """Relative error |y - y'| / |y| of one layer in float32, against the direct convolution in float64.

    The weights are Gaussian, the input a Gaussian's positive part. With `bits`, input, weight, output and everything in
    the Winograd domain are quantized; the transforms are exact, and `per_tap` gives each tap a scale of its own.
    Draws differ by some percent: the scales follow the largest values.
    """
    generator = torch.Generator().manual_seed(seed)
    r, side = transforms.r, transforms.m * 4 + transforms.r
    x = torch.randn(8, channels, side, side, generator=generator).relu()
    weight = torch.randn(channels, channels, r, r, generator=generator)
    whole = (1, 1, 1, 1)
    tap = (transforms.t**2, 1, 1, 1) if per_tap else whole
    shapes = (whole, whole, tap, tap, tap, whole)
    stages = Stages(*(Stage(Rounding(bits, shape), "joined") for shape in shapes)) if bits else Stages()
    states = [empty_range(shape) if bits else None for shape in shapes]
    squares = Matrices(*map(_square, (transforms.at, transforms.g, transforms.bt)))
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    y, _ = winograd_conv2d(x, weight, None, squares, Geometry(transforms.m, (r, r)), stages, states)
    return float((y - exact).norm() / exact.norm())


def _square(matrix: Matrix) -> torch.Tensor:
    """In float32, each entry rounded once."""
    return kronecker(torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64)).float()
