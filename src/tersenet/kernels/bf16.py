"""Dense convolutions in bfloat16 on AMX's matrix tiles, in IR: one product, summed in float32.

Inputs, residuals and results are float32 or bfloat16 in memory, each as the call says. Rounding to bfloat16 is the only
error but for float32 sums: 2e-3 of a layer's result.

A block of output rows, or of whole images, is copied into V once: the padded image in bfloat16. Each tap of the kernel
is another place in it, so nothing is copied twice; the products are made for the columns of padding too, and dropped. A
tile takes 16 pixels, which lie `v_step` numbers apart, so that strides need no copies either. Strides along rows are
phases: rows of V whose numbers differ by a multiple of the stride follow each other.

* V[image][phase][row][column][32] for each chunk of 32 channels of each group, where channels fill chunks; else
  V[image][phase][row][column][channel], of which a row of the kernel is one piece: the next pixels' numbers behind it
  meet weights that are zero
* the input itself for 1x1 kernels, where it is bfloat16 and its channels are whole chunks
* U[16 output channels][chunk][tap][pair of inputs][16 outputs x 2]

Results are the same for any number of threads and any cut.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

from tersenet.kernels.amx import GROUP, LINE, TILE, Tiles
from tersenet.kernels.bf16_copy import copy_functions
from tersenet.kernels.bf16_finish import TALL, finish_functions
from tersenet.kernels.bf16_values import BITS
from tersenet.kernels.blocks import TASK, own_scratch, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

BF16_TASKS = ("run_bf16",)
_QUAD, _QUADS = 4, 4  # cache lines that are fetched together; so many times, of one tile of weights
_AHEAD = 8  # tiles of weights that are fetched ahead


@dataclass(frozen=True)
class Bf16:
    """The code for all sizes, which are arguments. `isa` has the tiles."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"bf16-{self.isa.name}"


def generate_bf16(algorithm: Bf16) -> str:
    """The text of its module, with the one task `run_bf16`."""
    isa = algorithm.isa
    module = Module(isa.width, '"prefer-vector-width"="512" "min-legal-vector-width"="512"')
    copy_functions(module)
    _products(module, isa)
    finish_functions(module, isa)
    _outputs(module, isa)
    _run(module)
    return module.text()


_PARAMETERS = "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %m, ptr %ahead, i64 %quads"


def _products(module: Module, isa: Isa) -> None:
    """`product_wide`: the sums of up to 32 pixels (`%rows` tiles) by 16 or 32 output channels (`%columns` tiles), to
    M[16 channels][pixel][16]: two by two tiles load least. `product_tall`: those of up to 64 pixels, 16 channels after
    the others, so that weights are read once, and in order."""
    wide, tall = list(itertools.product((1, 2), range(1, isa.columns + 1))), range(1, TALL // LINE + 1)
    for rows, columns in dict.fromkeys([*wide, *((rows, 1) for rows in tall)]):
        _kernel(module, isa, rows, columns)
    typed = _PARAMETERS.replace("noalias ", "").split(", ")
    f = module.function("product_wide", f"{_PARAMETERS}, i64 %rows, i64 %columns", inline=True)
    names = {rows * isa.columns + columns: f"product_{rows}_{columns}" for rows, columns in wide}
    f.switch(
        f.add(f.mul("%rows", isa.columns), "%columns"),
        {number: partial(f.call, name, *typed) for number, name in names.items()},
    )
    f = module.function(
        "product_tall",
        "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %m, i64 %rows, i64 %columns",
        inline=True,
    )
    panel = _panel(f)
    with f.loop("%columns") as column:
        u, m = f.offset("%u", f.mul(panel, column.index)), f.offset("%m", f.mul(column.index, TALL * LINE))
        these = ["ptr %context", "ptr %v", f"ptr {u}", f"ptr {m}", f"ptr {f.offset(u, _AHEAD * TILE)}", f"i64 {_QUADS}"]
        f.switch("%rows", {rows: partial(f.call, f"product_{rows}_1", *these) for rows in tall})


def _panel(f: Function) -> str:
    """Floats that the weights of 16 output channels take."""
    c = ContextReader(f, "chunks", "size_high", "size_wide")
    return f.mul(f.mul(f.mul(c["chunks"], c["size_high"]), c["size_wide"]), TILE)


def _kernel(module: Module, isa: Isa, rows: int, columns: int) -> None:
    """Beside each step's products `%quads` times four lines are brought into the second-level cache, from `%ahead` on:
    the processor itself does not look behind the end of a page."""
    f = module.function(f"product_{rows}_{columns}", _PARAMETERS)
    c = ContextReader(
        f, "chunks", "size_high", "size_wide", "step_high", "tap_high", "tap_wide", "v_vector", "v_phase", "v_row",
        "v_step",
    )  # fmt: skip
    sums = list(itertools.product(range(rows), range(columns)))
    tiles = Tiles(f)
    for row, column in sums:
        tiles.zero(row * columns + column)
    panel = _panel(f)
    fetched = f.mul("%quads", _QUAD * LINE)
    apart = f.mul(c["v_step"], 2)
    weights, inputs = range(8 - columns, 8), range(rows * columns, 8 - columns)
    with f.loop(c["chunks"], carry=[("ptr", "%u"), ("ptr", "%ahead")]) as chunk:
        v = f.offset("%v", f.mul(chunk.index, c["v_vector"]), BITS)
        with f.loop(c["size_high"], carry=[("ptr", value) for value in chunk.values]) as high:
            down, phase = f.divmod(f.mul(high.index, c["tap_high"]), c["step_high"])
            line = f.offset(v, f.add(f.mul(down, c["v_row"]), f.mul(phase, c["v_phase"])), BITS)
            with f.loop(c["size_wide"], carry=[("ptr", value) for value in high.values]) as wide:
                u, ahead = wide.values
                a = f.offset(line, f.mul(wide.index, c["tap_wide"]), BITS)
                with f.loop("%quads") as quad:
                    for k in range(_QUAD):
                        f.prefetch(f.offset(ahead, f.add(f.mul(quad.index, _QUAD * LINE), k * LINE)), near=False)
                # Loads between products that don't wait for them.
                for row, column in sums:
                    tile = inputs[row % len(inputs)]
                    if row == 0:
                        tiles.load(weights[column], f.offset(u, f.mul(panel, column)))
                    if column == 0:
                        tiles.load(tile, f.offset(a, f.mul(c["v_step"], row * LINE), BITS), apart)
                    tiles.multiply(row * columns + column, tile, weights[column])
                wide.next([f.offset(u, TILE), f.offset(ahead, fetched)])
            high.next(wide.values)
        chunk.next(high.values)
    for row, column in sums:
        tiles.store(row * columns + column, f.offset("%m", (column * TALL + row * LINE) * LINE))


def _outputs(module: Module, isa: Isa) -> None:
    """The block `%output` of output channels for the pixels from `%begin` to `%end` behind row `%row` of `%images`
    images from `%image` on, whose V is there."""
    f = module.function(
        "outputs",
        "ptr %context, ptr noalias %v, ptr noalias %m, i64 %image, i64 %row, i64 %images, i64 %begin, i64 %end, "
        "i64 %output",
    )
    c = ContextReader(
        f, "weight", "bias", "r", "y", "out_channels", "out_height", "out_width",
        "group_channels", "group_outputs", "line", "v_own", "v_image", "v_step", "direct", "tiles", "r_half", "y_half",
    )  # fmt: skip
    panel = f.mul(_panel(f), isa.columns)
    u = f.offset(c["weight"], f.mul("%output", panel))
    group, inside = f.divmod("%output", c["group_outputs"])
    before = f.mul(inside, isa.channels)
    channel = f.add(f.mul(group, c["group_channels"]), before)
    left_over = f.sub(c["group_channels"], before)
    columns = vectors_of(f, isa, inside, c["group_channels"])
    bias = f.offset(c["bias"], f.mul("%output", isa.channels))
    own = f.offset("%v", f.mul(group, c["v_own"]), BITS)
    first = f.mul("%row", c["line"])
    # Few pixels are one group.
    pixels = f.sub("%end", "%begin")
    is_small = f.compare("sle", pixels, TALL)
    # Otherwise all groups together fetch the next block's weights.
    groups = f.mul(f.divmod(f.add(pixels, GROUP - 1), GROUP)[0], "%images")
    lines = isa.columns * LINE
    quads = f.divmod(f.add(f.divmod(f.add(f.sub(groups, 1), lines), groups)[0], _QUAD - 1), _QUAD)[0]
    steps = f.divmod(panel, isa.columns * TILE)[0]
    size = f.op(f"select i1 {is_small}, i64 {TALL}, i64 {GROUP}")

    def finish(sums: str, pixel: str, count: str) -> None:
        where = f"ptr {bias}", f"ptr {r}", f"ptr {y}", f"i64 {f.add(first, pixel)}"
        f.call("finish", "ptr %context", f"ptr {sums}", *where, f"i64 {count}", f"i64 {left_over}")

    with f.loop("%images") as image:
        numbers = f.mul(f.mul(f.mul(f.add("%image", image.index), c["out_height"]), c["out_width"]), c["out_channels"])
        numbers = f.add(numbers, channel)
        plane = f.offset(own, f.mul(image.index, c["v_image"]), BITS)
        r, y = (_typed(f, c[name], numbers, c[f"{name}_half"]) for name in "ry")
        # The epilogue of a group comes when the next one's products are made: what tiles write can be read only when it
        # has left the processor, behind all that was written before.
        waiting = [("ptr", "%m"), ("ptr", f.offset("%m", isa.columns * TALL * LINE)), ("ptr", "%m")]
        with f.loop("%end", start="%begin", step=size, carry=[*waiting, ("i64", "%begin"), ("i64", "0")]) as part:
            m, other, *before = part.values
            left = f.minimum(f.sub("%end", part.index), size)
            rows = f.divmod(f.add(left, LINE - 1), LINE)[0]
            # Of the input itself nothing is read behind its end: the last tiles begin earlier.
            end = f.sub(c["tiles"], f.mul(rows, LINE))
            last = f.op(f"select i1 {f.compare('ne', c['direct'], 0)}, i64 {f.sub(end, first)}, i64 {part.index}")
            start = f.minimum(part.index, last)
            v = f.offset(plane, f.mul(start, c["v_step"]), BITS)
            given = ["ptr %context", f"ptr {v}", f"ptr {u}", f"ptr {m}"]
            tiled = [f"i64 {rows}", f"i64 {columns}"]
            with f.when(is_small):
                f.call("product_tall", *given, *tiled)
            with f.when(f.op(f"xor i1 {is_small}, true")):
                number = f.divmod(f.sub(part.index, "%begin"), GROUP)[0]
                done = f.mul(f.mul(f.add(f.mul(image.index, f.divmod(groups, "%images")[0]), number), quads), _QUAD)
                wanted = f.op(f"select i1 {f.compare('slt', done, lines)}, i64 {quads}, i64 0")
                ahead = f.offset(f.offset(u, panel), f.mul(f.mul(done, steps), LINE))
                f.call("product_wide", *given, f"ptr {ahead}", f"i64 {wanted}", *tiled)
            finish(*before)
            part.next([other, m, f.offset(m, f.mul(f.sub(part.index, start), LINE)), part.index, left])
        finish(*part.values[2:])


def _typed(f: Function, pointer: str, index: str, half: str) -> str:
    """The address of a number, of bfloat16 ones if `half` is not 0."""
    is_half = f.compare("ne", half, 0)
    return f.op(f"select i1 {is_half}, ptr {f.offset(pointer, index, BITS)}, ptr {f.offset(pointer, index)}")


def _run(module: Module) -> None:
    """Units are blocks times steps of output channels; the block that a thread had last is still in its V."""
    f = module.function("run_bf16", TASK, exported=True)
    c = ContextReader(
        f, "x", "x_image", "block", "block_rows", "block_count", "images", "out_height", "units", "outputs",
        "output_step", "halo", "v_total", "direct", "line", "v_step", "out_width", "piece",
    )  # fmt: skip
    own = own_scratch(f)
    scratch = f.offset(own, LINE)  # the first line has the number of the block in V
    m = f.offset(scratch, c["v_total"])
    f.store("i64", "-1", own, 8)
    tiles = Tiles(f)
    tiles.begin()
    is_direct = f.compare("ne", c["direct"], 0)
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["units"], steps)) as unit:
        number, step = f.divmod(unit, steps)
        group, part = f.divmod(number, c["block_count"])
        image, row = f.mul(group, c["block"]), f.mul(part, c["block_rows"])
        images = f.minimum(c["block"], f.sub(c["images"], image))
        rows = f.minimum(c["block_rows"], f.sub(c["out_height"], row))
        there = f.offset(c["x"], f.add(f.mul(image, c["x_image"]), f.mul(f.mul(row, c["line"]), c["v_step"])), BITS)
        v = f.op(f"select i1 {is_direct}, ptr {there}, ptr {scratch}")
        is_new = f.compare("ne", f.load("i64", own, 8), number)
        with f.when(f.op(f"select i1 {is_direct}, i1 false, i1 {is_new}")):
            f.store("i64", number, own, 8)
            f.call(
                "copy", "ptr %context", f"ptr {scratch}", f"i64 {image}", f"i64 {row}", f"i64 {images}",
                f"i64 {f.add(rows, c['halo'])}",
            )  # fmt: skip
        begin = f.mul(step, c["output_step"])
        end = f.minimum(f.add(begin, c["output_step"]), c["outputs"])
        count = f.add(f.mul(f.sub(rows, 1), c["line"]), c["out_width"])
        with f.loop(count, step=c["piece"]) as piece:
            until = f.minimum(f.add(piece.index, c["piece"]), count)
            with f.loop(end, start=begin) as output:
                f.call(
                    "outputs", "ptr %context", f"ptr {v}", f"ptr {m}", f"i64 {image}", f"i64 {row}", f"i64 {images}",
                    f"i64 {piece.index}", f"i64 {until}", f"i64 {output.index}",
                )  # fmt: skip
    tiles.end()
