"""Dense convolutions by AMX's matrix tiles, in IR: float32 in and out, products of bfloat16 parts.

A float32 is the sum of two bfloat16 numbers but for 2^-17 of it at most: x = high + low. A product is then
high high + high low + low high, three of AMX's products of 16 pixels x 32 inputs x 16 outputs, summed in float32. AMX
makes sixteen times as many products as the vector units, so that this is still five times faster than float32. The
error of a sum is a few 10^-6 of its terms, between that of float32 and that of F(4x4, 3x3) in float32. The tiles know
no denormal numbers, so that numbers below 10^-34 lose their low parts. The low part of an infinity, and of what is
beyond bfloat16's range (3.39 10^38), is NaN, and so are the sums that it goes into; no others.

A block of pixels is split into V once. Stride 1: V is the padded image, and each tap of the kernel is another place in
it, so nothing is copied twice; the products are made for the columns of padding too, and dropped. Else V is what the
kernel covers, row by row (a segment).

With groups of channels, each has chunks and blocks of its own.

* U[block of output channels][chunk][tap][low, high][column][pair of inputs][16 outputs x 2]
* V[chunk of 32 inputs][high, low][pixel][32]

Source: Henry, Tang, Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations, 2019 (the split). Results are the same for any number of threads and any cut.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.kernels.amx_copy import copy_function
from tersenet.kernels.blocks import TASK, own_scratch, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, finished, residual_added
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

AMX_TASKS = ("run_amx",)
CHUNK = 32  # inputs that one tile of products takes
LINE = 16  # floats of a row of a tile: 32 parts of inputs, or 16 sums
TILE = 16 * LINE  # floats of a tile
PARTS = 2
# Products of parts of pixels by parts of weights, in an order that loads few tiles.
_TERMS = (("high", "low"), ("high", "high"), ("low", "high"))
GROUP = 32  # pixels whose sums are kept in tiles together


@dataclass(frozen=True)
class Amx:
    """The code for all sizes, which are arguments. `isa` has the tiles."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"gemm-{self.isa.name}"


def generate_amx(algorithm: Amx) -> str:
    """The text of its module, with the one task `run_amx`."""
    isa = algorithm.isa
    module = Module(isa.width, '"prefer-vector-width"="512" "min-legal-vector-width"="512"')
    copy_function(module)
    product_kernels(module, isa)
    _finish(module, isa)
    _outputs(module, isa)
    _run(module, isa)
    return module.text()


_PARAMETERS = "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %m"


def product_kernels(module: Module, isa: Isa, parts: int = PARTS) -> None:
    """`product`: the sums of 16 or 32 pixels by 16 or 32 output channels, to M[16 channels][pixel][16]; `parts` of each
    number, 2 or 1."""
    kinds = list(itertools.product((1, 2), range(1, isa.columns + 1)))
    for rows, columns in kinds:
        _kernel(module, isa, rows, columns, parts)
    f = module.function("product", f"{_PARAMETERS}, i64 %rows, i64 %columns", inline=True)
    typed = _PARAMETERS.replace("noalias ", "").split(", ")
    f.switch(
        f.add(f.mul("%rows", isa.columns), "%columns"),
        {
            rows * isa.columns + columns: lambda rows=rows, columns=columns: f.call(f"product_{rows}_{columns}", *typed)
            for rows, columns in kinds
        },
    )


def _kernel(module: Module, isa: Isa, rows: int, columns: int, parts: int) -> None:
    f = module.function(f"product_{rows}_{columns}", _PARAMETERS)
    c = ContextReader(f, "chunks", "size_high", "size_wide", "tap_high", "tap_wide", "v_vector", "v_low", "m_vector")
    sums = list(itertools.product(range(rows), range(columns)))
    tiles = Tiles(f)
    for row, column in sums:
        tiles.zero(row * columns + column)
    step = parts * isa.columns * TILE
    terms = _TERMS if parts == PARTS else (("high", "high"),)
    taps = f.mul(c["size_high"], c["size_wide"])
    with f.loop(c["chunks"]) as chunk:
        v = f.offset("%v", f.mul(chunk.index, c["v_vector"]))
        u = f.offset("%u", f.mul(f.mul(chunk.index, taps), step))
        with f.loop(c["size_high"]) as high:
            line = f.offset(v, f.mul(high.index, c["tap_high"]))
            weights = f.offset(u, f.mul(f.mul(high.index, c["size_wide"]), step))
            with f.loop(c["size_wide"]) as wide:
                a = f.offset(line, f.mul(wide.index, c["tap_wide"]))
                b = f.offset(weights, f.mul(wide.index, step))
                pixels = {"high": a, "low": f.offset(a, c["v_low"])}
                weighed = {"low": b, "high": f.offset(b, (parts - 1) * isa.columns * TILE)}

                # Loads between products that don't wait for them.
                for (a_before, b_before), (a_part, b_part) in itertools.pairwise((("", ""), *terms)):
                    for row, column in sums:
                        if row == 0 and b_part != b_before:
                            tiles.load(6 + column, f.offset(weighed[b_part], column * TILE))
                        if column == 0 and a_part != a_before:
                            tiles.load(4 + row, f.offset(pixels[a_part], row * TILE))
                        tiles.multiply(row * columns + column, 4 + row, 6 + column)
    for row, column in sums:
        place = f.add(f.mul(c["m_vector"], column), row * TILE)
        tiles.store(row * columns + column, f.offset("%m", place))


def in_tiles(rows: Tensor, isa: Isa, parts: int = PARTS) -> Tensor:
    """The weights of output channels, (C_out, ..., chunks * 32) float32, as `product` reads them: (blocks, ..., chunks,
    parts, columns, 16, 16, 2) bfloat16; of one part that is the rounded weight. C_out must be a multiple of a block's
    channels."""
    chunk = rows.dim() + 1
    # Two floats are moved as one number of 64 bits.
    tiles = rows.contiguous().view(torch.float64).unflatten(-1, (-1, CHUNK // 2)).unflatten(0, (-1, isa.columns, LINE))
    # block, column, output, ..., chunk, pair -> block, ..., chunk, column, pair, output
    tiles = tiles.permute(0, *range(3, chunk + 1), 1, chunk + 1, 2).contiguous()
    tiles = tiles.view(torch.float32).unflatten(-1, (LINE, 2))
    large = tiles.bfloat16()
    if parts == 1:
        return large.unsqueeze(-5)
    return torch.stack([tiles.sub_(large.float()).bfloat16(), large], -5)


class Tiles:
    """Instructions on the eight tiles, which are known by number."""

    def __init__(self, f: Function) -> None:
        self._f = f

    def zero(self, tile: int) -> None:
        self._call("tilezero", "i8", f"i8 {tile}")

    def load(self, tile: int, pointer: str, apart: str | int = 64) -> None:
        """Rows are `apart` bytes from each other."""
        self._call("tileloadd64", "i8, ptr, i64", f"i8 {tile}, ptr {pointer}, i64 {apart}")

    def store(self, tile: int, pointer: str) -> None:
        self._call("tilestored64", "i8, ptr, i64", f"i8 {tile}, ptr {pointer}, i64 64")

    def multiply(self, total: int, a: int, b: int) -> None:
        self._call("tdpbf16ps", "i8, i8, i8", f"i8 {total}, i8 {a}, i8 {b}")

    def begin(self) -> None:
        """What comes before all others in a thread."""
        # Palette 1; all eight tiles have 16 rows of 64 bytes.
        layout = [1, 0] + [0] * 14 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
        values = ", ".join(f"i8 {value}" for value in layout)
        self._f.module.declarations.add(f"@layout = internal constant [64 x i8] [{values}], align 64")
        self._call("ldtilecfg", "ptr", "ptr @layout")

    def end(self) -> None:
        """What comes after them, so that no state is left to be saved."""
        self._call("tilerelease", "", "")

    def _call(self, name: str, kinds: str, arguments: str) -> None:
        kinds = kinds.replace("i8", "i8 immarg")
        self._f.module.declarations.add(f"declare void @llvm.x86.{name}({kinds})")
        self._f.line(f"call void @llvm.x86.{name}({arguments})")


def _finish(module: Module, isa: Isa) -> None:
    """The epilogue of the `%count` pixels from `%pixel` on, whose sums are in `%m`, for up to `%channels` channels.

    Pixels in the columns of padding are passed over.
    """
    f = module.function(
        "finish",
        "ptr %context, ptr noalias %m, ptr noalias %bias, ptr %r, ptr %y, i64 %pixel, i64 %count, i64 %channels",
    )
    c = ContextReader(f, "line", "out_width", "out_channels", "low", "high", "silu", "r")
    full = f.both(f.compare("sge", "%channels", isa.channels), f.compare("eq", c["silu"], 0))
    row, column = f.divmod("%pixel", c["line"])
    bias = [f.vload(f.offset("%bias", k * isa.width)) for k in range(isa.columns)]
    with f.loop("%count", carry=[("i64", row), ("i64", column)]) as pixel:
        row, column = pixel.values
        with f.when(f.compare("slt", column, c["out_width"])):
            place = f.mul(f.add(f.mul(row, c["out_width"]), column), c["out_channels"])
            y, r = f.offset("%y", place), f.offset("%r", place)
            sums = f.offset("%m", f.mul(pixel.index, LINE))
            with f.when(full):
                values = [
                    f.vadd(f.vload(f.offset(sums, k * GROUP * LINE), align=64), bias[k]) for k in range(isa.columns)
                ]
                residuals = [f.offset(r, k * isa.width) for k in range(isa.columns)]
                values = clamped(f, c, residual_added(f, c, values, residuals))
                for k, value in enumerate(values):
                    f.vstore(value, f.offset(y, k * isa.width))
            with f.when(f.op(f"xor i1 {full}, true")):
                for k in range(isa.columns):
                    _careful(f, isa, c, k, sums, bias[k], y, r)
        pixel.next(f.following(row, column, c["line"]))


def _careful(f: Function, isa: Isa, c: ContextReader, k: int, sums: str, bias: str, y: str, r: str) -> None:
    """A vector of channels of one pixel, of which not all may exist."""
    begin = k * isa.width
    with f.when(f.compare("sgt", "%channels", begin)):
        lanes = f.lanes(f.sub("%channels", begin))
        value = f.vadd(f.vload(f.offset(sums, k * GROUP * LINE), align=64), bias)
        (value,) = finished(f, c, [value], [f.offset(r, begin)], [lanes])
        f.vstore(value, f.offset(y, begin), lanes)


def _outputs(module: Module, isa: Isa) -> None:
    """The block `%output` of output channels for the `%count` pixels of `%image` from `%pixel` on, whose V is there."""
    f = module.function(
        "outputs",
        "ptr %context, ptr noalias %v, ptr noalias %m, i64 %image, i64 %pixel, i64 %count, i64 %output",
    )
    c = ContextReader(
        f, "weight", "bias", "r", "y", "chunks", "size_high", "size_wide", "out_channels", "out_height", "out_width",
        "group_channels", "group_outputs", "v_vector",
    )  # fmt: skip
    panel = f.mul(f.mul(f.mul(c["chunks"], c["size_high"]), c["size_wide"]), PARTS * isa.columns * TILE)
    u = f.offset(c["weight"], f.mul("%output", panel))
    group, inside = f.divmod("%output", c["group_outputs"])
    before = f.mul(inside, isa.channels)
    begin = f.add(f.mul(group, c["group_channels"]), before)
    left_over = f.sub(c["group_channels"], before)
    columns = vectors_of(f, isa, inside, c["group_channels"])
    bias = f.offset(c["bias"], f.mul("%output", isa.channels))
    own = f.offset("%v", f.mul(group, f.mul(c["chunks"], c["v_vector"])))
    image = f.mul(f.mul(f.mul("%image", c["out_height"]), c["out_width"]), c["out_channels"])
    r, y = (f.offset(c[name], f.add(image, begin)) for name in "ry")
    with f.loop("%count", step=GROUP) as part:
        left = f.minimum(f.sub("%count", part.index), GROUP)
        rows = f.divmod(f.add(left, LINE - 1), LINE)[0]
        v = f.offset(own, f.mul(part.index, LINE))
        f.call("product", "ptr %context", f"ptr {v}", f"ptr {u}", "ptr %m", f"i64 {rows}", f"i64 {columns}")
        f.call(
            "finish", "ptr %context", "ptr %m", f"ptr {bias}", f"ptr {r}", f"ptr {y}",
            f"i64 {f.add('%pixel', part.index)}", f"i64 {left}", f"i64 {left_over}",
        )  # fmt: skip


def _run(module: Module, isa: Isa) -> None:
    """Units are blocks of pixels times steps of output channels; the block that a thread had last is still in its V."""
    f = module.function("run_amx", TASK, exported=True)
    c = ContextReader(f, "tiles", "block", "block_count", "units", "outputs", "output_step", "v_block", "halo")
    own = own_scratch(f)
    v = f.offset(own, LINE)  # the first line has the number of the block in V
    m = f.offset(v, c["v_block"])
    f.store("i64", "-1", own, 8)
    tiles = Tiles(f)
    tiles.begin()
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["units"], steps)) as unit:
        number, step = f.divmod(unit, steps)
        image, part = f.divmod(number, c["block_count"])
        pixel = f.mul(part, c["block"])
        count = f.minimum(c["block"], f.sub(c["tiles"], pixel))
        with f.when(f.compare("ne", f.load("i64", own, 8), number)):
            f.store("i64", number, own, 8)
            f.call("copy", "ptr %context", f"ptr {v}", f"i64 {image}", f"i64 {pixel}", f"i64 {f.add(count, c['halo'])}")
        begin = f.mul(step, c["output_step"])
        end = f.minimum(f.add(begin, c["output_step"]), c["outputs"])
        with f.loop(end, start=begin) as output:
            f.call(
                "outputs", "ptr %context", f"ptr {v}", f"ptr {m}", f"i64 {image}", f"i64 {pixel}", f"i64 {count}",
                f"i64 {output.index}",
            )  # fmt: skip
    tiles.end()
