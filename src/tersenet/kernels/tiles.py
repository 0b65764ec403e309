"""Input and output transforms of one tile for one vector of channels, in IR.

Memory is channels-last: a pixel's channels lie together, so that a vector of channels is one load. Each transform has
two variants: `inner` for whole tiles and whole vectors, and `careful` for the rest, which reads and writes by masks.
"""

from __future__ import annotations

import itertools
from functools import partial

from tersenet.kernels.amx_copy import HALF, halves
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, finished, residual_added
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.linear import apply
from tersenet.ops.cook_toom import Transforms


def input_transforms(
    module: Module, transforms: Transforms, relu: bool, parts: int = 0, threshold: float = 0.0
) -> None:
    """`input_inner` and `input_careful`: B^T d B of one tile, with `relu` its ReLU. Tap k goes to `%v` + k `v_tap`;
    with `parts` 2 as high and low bfloat16 numbers, these `v_low` behind those, with 1 rounded to one.

    `%x` is the tile's first pixel. For `input_careful` it may lie outside the image: pixels from row `%top` and column
    `%left` on that are outside, and channels from `%channels` on, are not read and count as zero.
    """
    t = transforms.t
    f = module.function("input_inner", "ptr %context, ptr noalias %x, ptr noalias %v")
    c = ContextReader(f, "x_row", "x_column", "v_tap", "v_low")
    rows = [f.offset("%x", f.mul(c["x_row"], i)) for i in range(t)]
    columns = [f.mul(c["x_column"], j) for j in range(t)]
    _next_tile(f, transforms, rows, c["x_column"])
    half = [apply(f, transforms.bt, [f.vload(f.offset(row, column)) for row in rows]) for column in columns]
    _taps_of_input(f, transforms, relu, threshold, c, half, parts)

    f = module.function(
        "input_careful", "ptr %context, ptr noalias %x, ptr noalias %v, i64 %top, i64 %left, i64 %channels"
    )
    c = ContextReader(f, "x_row", "x_column", "v_tap", "v_low", "height", "width")
    rows = [f.offset("%x", f.mul(c["x_row"], i)) for i in range(t)]
    columns = [f.mul(c["x_column"], j) for j in range(t)]
    _next_tile(f, transforms, rows, c["x_column"])
    lanes = f.lanes("%channels")
    masks = [f.masked(lanes, _inside(f, f.add("%top", i), c["height"])) for i in range(t)]
    half: list[list[str]] = []
    for j, column in enumerate(columns):
        places = [f.offset(row, column) for row in rows]
        half.append(
            f.choose(
                _inside(f, f.add("%left", j), c["width"]),
                module.vector,
                partial(_half_column, f, transforms, places, masks),
                lambda: ["zeroinitializer"] * t,
            )
        )
    _taps_of_input(f, transforms, relu, threshold, c, half, parts)


def output_transforms(module: Module, transforms: Transforms) -> None:
    """`output_inner` and `output_careful`: A^T M A of one tile, with bias, residual and activation.

    The factor of a channel lies `bias_scale` behind its bias. `%y` and `%r` are the tile's first pixel in the output
    and in the residual. `output_careful` writes at most `%rows` times `%columns` pixels and `%channels` channels; only
    it has SiLU.
    """
    m = transforms.m
    pointers = "ptr %context, ptr noalias %m, ptr noalias %bias, ptr %r, ptr %y"
    f = module.function("output_inner", pointers)
    c = ContextReader(f, "m_tap", "y_row", "y_column", "r_row", "r_column", "low", "high", "r", "bias_scale")
    bias, scale = f.vload("%bias"), f.vload(f.offset("%bias", c["bias_scale"]))
    next_tile = list(itertools.product(range(m), range(m, 2 * m)))
    for i, j in next_tile:
        f.prefetch(_pixel(f, c, "y", i, j), near=False)
    with f.when(f.op(f"icmp ne ptr {c['r']}, null")):
        for i, j in next_tile:
            f.prefetch(_pixel(f, c, "r", i, j), near=False)
    for i, values in enumerate(_output(f, transforms, c["m_tap"])):
        values = [f.vmuladd(value, scale, bias) for value in values]
        values = residual_added(f, c, values, [_pixel(f, c, "r", i, j) for j in range(m)])
        for j, value in enumerate(clamped(f, c, values)):
            f.vstore(value, _pixel(f, c, "y", i, j))

    f = module.function("output_careful", f"{pointers}, i64 %rows, i64 %columns, i64 %channels")
    c = ContextReader(f, "m_tap", "y_row", "y_column", "r_row", "r_column", "low", "high", "silu", "r", "bias_scale")
    lanes = f.lanes("%channels")
    masks = [f.masked(lanes, f.compare("sgt", "%columns", j)) for j in range(m)]
    bias, scale = f.vload("%bias"), f.vload(f.offset("%bias", c["bias_scale"]))
    for i, values in enumerate(_output(f, transforms, c["m_tap"])):
        with f.when(f.compare("sgt", "%rows", i)):
            values = [f.vmuladd(value, scale, bias) for value in values]
            values = finished(f, c, values, [_pixel(f, c, "r", i, j) for j in range(m)], masks)
            for j, value in enumerate(values):
                f.vstore(value, _pixel(f, c, "y", i, j), masks[j])


def _next_tile(f: Function, transforms: Transforms, rows: list[str], x_column: str) -> None:
    """Bring near what the next tile in the row reads and this one doesn't."""
    for j in range(transforms.t, transforms.t + transforms.m):
        for row in rows:
            f.prefetch(f.offset(row, f.mul(x_column, j)), near=False)


def _half_column(f: Function, transforms: Transforms, places: list[str], masks: list[str]) -> list[str]:
    """B^T d for one column of pixels; what a mask leaves out is zero."""
    return apply(f, transforms.bt, [f.vload(place, mask) for place, mask in zip(places, masks, strict=True)])


def _taps_of_input(
    f: Function,
    transforms: Transforms,
    relu: bool,
    threshold: float,
    c: ContextReader,
    half: list[list[str]],
    parts: int,
) -> None:
    """(B^T d) B, or its ReLU, or what of it is further than `threshold` from zero; `half` has the columns of B^T d."""
    t = transforms.t
    for i in range(t):
        for j, value in enumerate(apply(f, transforms.bt, [column[i] for column in half])):
            value = f.vpositive(value) if relu else f.vcut(value, threshold) if threshold else value
            place = f.offset("%v", f.mul(c["v_tap"], i * t + j))
            if parts:
                lines = (place, f.offset(place, c["v_low"]))[:parts]
                for part, line in zip(halves(f, value), lines, strict=False):
                    f.store(HALF, part, line, 32)
            else:
                f.vstore(value, place, align=4 * f.module.width)


def _output(f: Function, transforms: Transforms, m_tap: str) -> list[list[str]]:
    """The rows of A^T M A."""
    t, at = transforms.t, transforms.at
    taps = [[f.offset("%m", f.mul(m_tap, i * t + j)) for j in range(t)] for i in range(t)]
    half = [apply(f, at, [f.vload(taps[i][j], align=4 * f.module.width) for i in range(t)]) for j in range(t)]
    return [apply(f, at, [half[j][i] for j in range(t)]) for i in range(transforms.m)]


def _pixel(f: Function, c: ContextReader, name: str, row: str | int, column: str | int) -> str:
    """Address of a pixel of the output `y` or the residual `r`, counted from the tile's first."""
    return f.offset(f"%{name}", f.add(f.mul(c[f"{name}_row"], row), f.mul(c[f"{name}_column"], column)))


def _inside(f: Function, place: str, size: str) -> str:
    """Whether a row or column is in the image."""
    return f.compare("ult", place, size)  # unsigned: what is negative is not inside either
