"""Input and output transforms of one tile for one vector of channels, in IR.

Memory is channels-last: a pixel's channels lie together, so that a vector of channels is one load. Each transform has
two variants: `inner` for whole tiles and whole vectors, and `careful` for the rest, which is copied pixel by pixel
through the place that the tile has in V or M.
"""

from __future__ import annotations

from collections.abc import Callable

from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, residual_added, silu
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.linear import apply
from tersenet.ops.cook_toom import Transforms


def input_transforms(module: Module, transforms: Transforms, relu: bool) -> None:
    """`input_inner` and `input_careful`: B^T d B of one tile, with `relu` its ReLU. Tap k goes to `%v` + k `v_tap`.

    `%x` is the tile's first pixel for `input_inner`, and the image's first for `input_careful`, which takes pixels
    outside the image and channels beyond `%channels` as zero.
    """
    t = transforms.t
    f = module.function("input_inner", "ptr %context, ptr noalias %x, ptr noalias %v")
    c = ContextReader(f, "x_row", "x_column", "v_tap")
    rows = [f.offset("%x", f.mul(c["x_row"], i)) for i in range(t)]
    columns = [f.mul(c["x_column"], j) for j in range(t)]
    _input(f, transforms, relu, c["v_tap"], lambda i, j: f.vload(f.offset(rows[i], columns[j])))

    f = module.function(
        "input_careful", "ptr %context, ptr noalias %x, ptr noalias %v, i64 %top, i64 %left, i64 %channels"
    )
    c = ContextReader(f, "x_row", "x_column", "v_tap", "height", "width")
    lanes = f.lanes("%channels")
    with f.loop(t) as i:
        y, is_row = _moved_inside(f, f.add("%top", i.index), c["height"])
        row = f.offset("%x", f.mul(y, c["x_row"]))
        with f.loop(t) as j:
            x, is_column = _moved_inside(f, f.add("%left", j.index), c["width"])
            value = f.vload(f.offset(row, f.mul(x, c["x_column"])), lanes)
            v = module.vector
            value = f.op(f"select i1 {f.both(is_row, is_column)}, {v} {value}, {v} zeroinitializer")
            tap = f.add(f.mul(i.index, t), j.index)
            f.vstore(value, f.offset("%v", f.mul(c["v_tap"], tap)), align=4 * module.width)
    taps = [[f.offset("%v", f.mul(c["v_tap"], i * t + j)) for j in range(t)] for i in range(t)]
    _input(f, transforms, relu, c["v_tap"], lambda i, j: f.vload(taps[i][j], align=4 * module.width))


def output_transforms(module: Module, transforms: Transforms) -> None:
    """`output_inner` and `output_careful`: A^T M A of one tile, with bias, residual and activation.

    The factor of a channel lies `bias_scale` behind its bias. `%y` and `%r` are the tile's first pixel in the output
    and in the residual. `output_careful` writes at most `%rows` times `%columns` pixels and `%channels` channels; only
    it has SiLU.
    """
    m = transforms.m
    pointers = "ptr %context, ptr noalias %m, ptr noalias %bias, ptr noalias %r, ptr noalias %y"
    f = module.function("output_inner", pointers)
    c = ContextReader(f, "m_tap", "y_row", "y_column", "r_row", "r_column", "low", "high", "r", "bias_scale")
    bias, scale = f.vload("%bias"), f.vload(f.offset("%bias", c["bias_scale"]))
    for i, values in enumerate(_output(f, transforms, c["m_tap"])):
        values = [f.vmuladd(value, scale, bias) for value in values]
        values = residual_added(f, c, values, [_pixel(f, c, "r", i, j) for j in range(m)])
        for j, value in enumerate(clamped(f, c, values)):
            f.vstore(value, _pixel(f, c, "y", i, j))

    f = module.function("output_careful", f"{pointers}, i64 %rows, i64 %columns, i64 %channels")
    c = ContextReader(f, "m_tap", "y_row", "y_column", "r_row", "r_column", "low", "high", "silu", "r", "bias_scale")
    aligned = 4 * module.width
    for i, values in enumerate(_output(f, transforms, c["m_tap"])):
        for j, value in enumerate(values):
            f.vstore(value, f.offset("%m", f.mul(c["m_tap"], i * m + j)), align=aligned)
    lanes = f.lanes("%channels")
    bias, scale = f.vload("%bias"), f.vload(f.offset("%bias", c["bias_scale"]))
    with f.loop(f.minimum("%rows", m)) as i, f.loop(f.minimum("%columns", m)) as j:
        tap = f.add(f.mul(i.index, m), j.index)
        value = f.vload(f.offset("%m", f.mul(c["m_tap"], tap)), align=aligned)
        value = f.vmuladd(value, scale, bias)
        values = residual_added(f, c, [value], [_pixel(f, c, "r", i.index, j.index)], lanes)
        is_silu = f.compare("ne", c["silu"], 0)
        (value,) = f.choose(
            is_silu, module.vector, lambda: [silu(f, value) for value in values], lambda: clamped(f, c, values)
        )
        f.vstore(value, _pixel(f, c, "y", i.index, j.index), lanes)


def _input(f: Function, transforms: Transforms, relu: bool, v_tap: str, read: Callable[[int, int], str]) -> None:
    """B^T d B, or its ReLU; everything is read before the first tap is written."""
    t, bt = transforms.t, transforms.bt
    half = [apply(f, bt, [read(i, j) for i in range(t)]) for j in range(t)]
    for i in range(t):
        for j, value in enumerate(apply(f, bt, [half[column][i] for column in range(t)])):
            value = f.vpositive(value) if relu else value
            f.vstore(value, f.offset("%v", f.mul(v_tap, i * t + j)), align=4 * f.module.width)


def _output(f: Function, transforms: Transforms, m_tap: str) -> list[list[str]]:
    """The rows of A^T M A."""
    t, at = transforms.t, transforms.at
    taps = [[f.offset("%m", f.mul(m_tap, i * t + j)) for j in range(t)] for i in range(t)]
    half = [apply(f, at, [f.vload(taps[i][j], align=4 * f.module.width) for i in range(t)]) for j in range(t)]
    return [apply(f, at, [half[j][i] for j in range(t)]) for i in range(transforms.m)]


def _pixel(f: Function, c: ContextReader, name: str, row: str | int, column: str | int) -> str:
    """Address of a pixel of the output `y` or the residual `r`, counted from the tile's first."""
    return f.offset(f"%{name}", f.add(f.mul(c[f"{name}_row"], row), f.mul(c[f"{name}_column"], column)))


def _moved_inside(f: Function, place: str, size: str) -> tuple[str, str]:
    """The nearest coordinate in the image, so that its address is valid, and whether `place` is in the image."""
    inside = f.compare("ult", place, size)  # unsigned: what is negative is not inside either
    return f.maximum(f.minimum(place, f.sub(size, 1)), 0), inside
