"""Winograd-aware layers in 8-bit integers, in IR: transforms in float32 of whole numbers, levels of each tap.

Behind exact points the transformed input is exact, since its whole numbers (or fractions of a power of two) are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tersenet.kernels.blocks import TASK, own_scratch, tiles_of_block, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, residual_added
from tersenet.kernels.host import Isa
from tersenet.kernels.int8_direct import adjusted, as_floats, epilogue_tables, kind_of
from tersenet.kernels.int8_product import CHUNK, ByteTiles, group_of, has_tiles, panel_bytes
from tersenet.kernels.int8_quantize import ROUNDER, as_bytes, between, fields_of, leveller, number, offset_of, times
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.linear import apply

LINE = 16  # floats
PLACES = 64
"""Floats before the sums' tables in `list`: a factor for each tap of the transformed input."""

Rows = Sequence[Sequence[Fraction]]


def winograd_functions(module: Module, isa: Isa, at: Rows, bt: Rows, product: bool, output: bool, given: bool) -> None:
    """The task `run_winograd`. `product` and `output` have levels. `given`: the result is the next layer's levels."""
    m, taps = len(at), len(bt) ** 2
    _input(module, isa, bt)
    _transform_block(module, isa, m)
    _product_block(module, isa, taps)
    _output(module, isa, at, product, output, given)
    _output_block(module, isa, m, given)
    f = module.function("run_winograd", TASK, exported=True)
    c = ContextReader(f, "block_count", "outputs", "output_step", "v_block")
    own = own_scratch(f)
    v = f.offset(own, LINE)  # the first line has the number of the block in V
    sums = f.offset(v, c["v_block"], "i8")
    f.store("i64", "-1", own, 8)
    if has_tiles(isa):
        ByteTiles(f).begin()
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["block_count"], steps)) as unit:
        block, step = f.divmod(unit, steps)
        with f.when(f.compare("ne", f.load("i64", own, 8), block)):
            f.store("i64", block, own, 8)
            f.call("transform_block", "ptr %context", f"ptr {v}", f"i64 {block}")
        begin = f.mul(step, c["output_step"])
        end = f.minimum(f.add(begin, c["output_step"]), c["outputs"])
        with f.loop(end, start=begin) as place:
            rest = (f"ptr {sums}", f"i64 {block}", f"i64 {place.index}")
            f.call("product_block", "ptr %context", f"ptr {v}", *rest)
            f.call("output_block", "ptr %context", *rest)
    if has_tiles(isa):
        ByteTiles(f).end()


def _tile(f: Function, number_of: str, m: int) -> tuple[str, str, str]:
    """Image, and first row and column of the output, of a tile."""
    c = ContextReader(f, "tiles_high", "tiles_wide")
    line, column = f.divmod(number_of, c["tiles_wide"])
    image, row = f.divmod(line, c["tiles_high"])
    return image, f.mul(row, m), f.mul(column, m)


def _transform_block(module: Module, isa: Isa, m: int) -> None:
    """V of the block `%number`."""
    f = module.function("transform_block", "ptr %context, ptr noalias %v, i64 %number")
    c = ContextReader(f, "block", "channels", "chunks", "shared", "line", "plane_chunk", "plane_image", "v_vector")
    first = f.mul("%number", c["block"])
    with f.loop(tiles_of_block(f, "%number")) as tile:
        image, row, column = _tile(f, f.add(first, tile.index), m)
        pixel = f.mul(f.add(f.mul(row, c["line"]), column), CHUNK)
        plane = f.offset(c["shared"], f.add(f.mul(image, c["plane_image"]), pixel), "i8")
        own = f.offset("%v", f.mul(tile.index, CHUNK), "i8")
        with f.loop(c["chunks"]) as chunk:
            left = f.minimum(f.sub(c["channels"], f.mul(chunk.index, CHUNK)), CHUNK)
            source = f.offset(plane, f.mul(chunk.index, c["plane_chunk"]), "i8")
            target = f.offset(own, f.mul(chunk.index, c["v_vector"]), "i8")
            # What fills up the last chunk may be anything: its weights are zero.
            with f.loop(left, step=isa.width) as part:
                x, v = (f.offset(pointer, part.index, "i8") for pointer in (source, target))
                f.call("input", "ptr %context", f"ptr {x}", f"ptr {v}")


def _input(module: Module, isa: Isa, bt: Rows) -> None:
    """Levels of B^T d B of one tile for a vector of channels; tap k goes to `%v` + k `v_tap`."""
    f = module.function("input", "ptr %context, ptr noalias %x, ptr noalias %v")
    c = ContextReader(f, "line", "list", "v_tap", "v_least", "v_most")
    t, kind = len(bt), f"<{isa.width} x i8>"
    least, most = number(f, c, "v_least"), number(f, c, "v_most")
    rows = [f.offset("%x", f.mul(c["line"], i * CHUNK), "i8") for i in range(t)]

    def level(row: str, column: int) -> str:
        found = f.load(kind, f.offset(row, column * CHUNK, "i8"), isa.width)
        return f.op(f"sitofp {kind} {found} to {module.vector}")

    half = [apply(f, bt, [level(row, column) for row in rows]) for column in range(t)]
    for i in range(t):
        for j, value in enumerate(apply(f, bt, [column[i] for column in half])):
            tap = i * t + j
            factor = f.spread(f.load("float", f.offset(c["list"], tap), 4))
            value = between(f, times(f, value, factor, offset_of(isa)), least, most)
            place = f.offset("%v", f.mul(c["v_tap"], tap), "i8")
            f.store(kind, as_bytes(f, value), place, isa.width)


def _product_block(module: Module, isa: Isa, taps: int) -> None:
    """M of the block `%number` for the block `%output` of output channels: M[tap][vector][tile][lanes]."""
    f = module.function("product_block", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %number, i64 %output")
    c = ContextReader(f, "weight", "initial", "chunks", "out_channels", "v_tap", "m_tap")
    count = tiles_of_block(f, "%number")
    columns = vectors_of(f, isa, "%output", c["out_channels"])
    panel = f.mul(c["chunks"], panel_bytes(isa))
    before = f.mul("%output", taps)
    starts = f.offset(c["weight"], c["initial"], "i8")
    with f.loop(taps) as tap:
        place = f.add(before, tap.index)
        u = f.offset(c["weight"], f.mul(place, panel), "i8")
        initial = f.offset(starts, f.mul(place, isa.channels))
        v = f.offset("%v", f.mul(tap.index, c["v_tap"]), "i8")
        m = f.offset("%m", f.mul(tap.index, c["m_tap"]))
        with f.loop(count, step=group_of(isa)) as group:
            left = f.minimum(f.sub(count, group.index), group_of(isa))
            f.call(
                "products", "ptr %context", f"ptr {f.offset(v, f.mul(group.index, CHUNK), 'i8')}", f"ptr {u}",
                f"ptr {initial}", f"ptr {f.offset(m, f.mul(group.index, isa.width))}", f"i64 {left}",
                f"i64 {columns}",
            )  # fmt: skip


def _output_block(module: Module, isa: Isa, m: int, given: bool) -> None:
    """Output and epilogue of the block `%number` for the block `%output` of output channels."""
    f = module.function("output_block", "ptr %context, ptr noalias %m, i64 %number, i64 %output")
    c = ContextReader(
        f, "block", "y", "r", "bias", "list", "out_height", "out_width", "out_channels", "m_vector", "wide"
    )
    first, begin = f.mul("%number", c["block"]), f.mul("%output", isa.channels)
    vectors = vectors_of(f, isa, "%output", c["out_channels"])
    with f.loop(tiles_of_block(f, "%number")) as tile:
        image, row, column = _tile(f, f.add(first, tile.index), m)
        pixel = f.add(f.mul(f.add(f.mul(image, c["out_height"]), row), c["out_width"]), column)
        pixel = f.mul(pixel, c["out_channels"])
        rows, columns = f.sub(c["out_height"], row), f.sub(c["out_width"], column)
        with f.loop(vectors) as vector:
            channel = f.add(begin, f.mul(vector.index, isa.width))
            sums = f.offset("%m", f.add(f.mul(vector.index, c["m_vector"]), f.mul(tile.index, isa.width)))
            factors = f.offset(c["list"], f.add(f.mul(channel, c["wide"]), PLACES))
            place = f.add(pixel, channel)
            r, y = f.offset(c["r"], place), f.offset(c["y"], place, kind_of(given))
            f.call(
                "output", "ptr %context", f"ptr {sums}", f"ptr {factors}", f"ptr {f.offset(c['bias'], channel)}",
                f"ptr {r}", f"ptr {y}", f"i64 {rows}", f"i64 {columns}", f"i64 {f.sub(c['out_channels'], channel)}",
            )  # fmt: skip


def _output(module: Module, isa: Isa, at: Rows, product: bool, rounds: bool, given: bool) -> None:
    """A^T M A of one tile for a vector of channels, with what follows, for at most `%rows` times `%columns` pixels."""
    f = module.function(
        "output",
        "ptr %context, ptr noalias %m, ptr noalias %factors, ptr noalias %bias, ptr %r, ptr %y, i64 %rows, "
        "i64 %columns, i64 %channels",
    )
    c = ContextReader(
        f, "m_tap", "factor_tap", "factors", "out_width", "out_channels", "low", "high", "r", "bias_scale",
        "s_least", "s_most", "y_least", "y_most", *fields_of("z"),
    )  # fmt: skip
    m, t = len(at), len(at[0])
    least, most = number(f, c, "s_least"), number(f, c, "s_most")

    def value(tap: int) -> str:
        """What the sums of a tap stand for."""
        place = f.offset("%factors", f.mul(c["factor_tap"], tap))
        line = f.offset("%m", f.mul(c["m_tap"], tap))
        f.prefetch(f.offset(line, isa.width))  # of the next tile
        sums, factor = as_floats(f, line), f.vload(place)
        if not product:
            return f.vmul(sums, factor)
        found = between(f, times(f, sums, factor), least, most)
        return f.vmul(f.vsub(found, f.splat(ROUNDER)), f.vload(f.offset(place, c["factors"])))

    half = [apply(f, at, [value(i * t + j) for i in range(t)]) for j in range(t)]
    lanes = f.lanes("%channels")
    masks = [f.masked(lanes, f.compare("sgt", "%columns", j)) for j in range(m)]
    tables = epilogue_tables(f, c, "%bias", rounds)
    row_floats = f.mul(c["out_width"], c["out_channels"])
    for i in range(m):
        values = apply(f, at, [half[j][i] for j in range(t)])
        with f.when(f.compare("sgt", "%rows", i)):
            before = f.mul(row_floats, i)
            places = [f.add(before, f.mul(c["out_channels"], j)) for j in range(m)]
            values = [adjusted(f, c, one, tables, rounds) for one in values]
            values = residual_added(f, c, values, [f.offset("%r", place) for place in places], masks)
            for j, (one, place) in enumerate(zip(clamped(f, c, values), places, strict=True)):
                to = f.offset("%y", place, kind_of(given))
                if not given:
                    f.vstore(one, to, masks[j])
                    continue
                with f.when(f.compare("sgt", "%columns", j)):
                    f.store(f"<{isa.width} x i8>", leveller(f, c, "z")(one), to, isa.width)
