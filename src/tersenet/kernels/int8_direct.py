"""Direct convolutions in 8-bit integers, in IR: products of the plane's lines, and what is done to their sums."""

from __future__ import annotations

from tersenet.kernels.blocks import TASK, own_scratch, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, residual_added
from tersenet.kernels.host import Isa
from tersenet.kernels.int8_product import CHUNK, ByteTiles, group_of, has_tiles, panel_bytes
from tersenet.kernels.int8_quantize import ROUNDER, between, fields_of, leveller, number
from tersenet.kernels.ir import Function, Module


def direct_functions(module: Module, isa: Isa, rounds: bool, given: bool) -> None:
    """The task `run_direct`. `rounds`: the output has levels. `given`: the result is the next layer's levels."""
    _finish(module, isa, rounds, given)
    _outputs(module, isa, given)
    f = module.function("run_direct", TASK, exported=True)
    c = ContextReader(f, "tiles", "block", "block_count", "group_count", "outputs", "output_step")
    m = own_scratch(f)
    if has_tiles(isa):
        ByteTiles(f).begin()
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["group_count"], steps)) as unit:
        number_of, step = f.divmod(unit, steps)
        image, part = f.divmod(number_of, c["block_count"])
        pixel = f.mul(part, c["block"])
        count = f.minimum(c["block"], f.sub(c["tiles"], pixel))
        begin = f.mul(step, c["output_step"])
        end = f.minimum(f.add(begin, c["output_step"]), c["outputs"])
        with f.loop(end, start=begin) as output:
            f.call(
                "outputs", "ptr %context", f"ptr {m}", f"i64 {image}", f"i64 {pixel}", f"i64 {count}",
                f"i64 {output.index}",
            )  # fmt: skip
    if has_tiles(isa):
        ByteTiles(f).end()


def _outputs(module: Module, isa: Isa, given: bool) -> None:
    """The block `%output` of output channels for the `%count` pixels of `%image` from `%pixel` on."""
    f = module.function("outputs", "ptr %context, ptr noalias %m, i64 %image, i64 %pixel, i64 %count, i64 %output")
    c = ContextReader(
        f, "shared", "plane_image", "weight", "initial", "taps", "chunks", "bias", "r", "y", "out_channels",
        "out_height", "out_width",
    )  # fmt: skip
    panel = f.mul(f.mul(c["taps"], c["chunks"]), panel_bytes(isa))
    u = f.offset(c["weight"], f.mul("%output", panel), "i8")
    begin = f.mul("%output", isa.channels)
    initial = f.offset(f.offset(c["weight"], c["initial"], "i8"), begin)
    columns = vectors_of(f, isa, "%output", c["out_channels"])
    plane = f.offset(c["shared"], f.mul("%image", c["plane_image"]), "i8")
    image = f.mul(f.mul(f.mul("%image", c["out_height"]), c["out_width"]), c["out_channels"])
    place = f.add(image, begin)
    r, y = f.offset(c["r"], place), f.offset(c["y"], place, kind_of(given))
    left_over = f.sub(c["out_channels"], begin)
    with f.loop("%count", step=group_of(isa)) as part:
        left = f.minimum(f.sub("%count", part.index), group_of(isa))
        pixel = f.add("%pixel", part.index)
        v = f.offset(plane, f.mul(pixel, CHUNK), "i8")
        f.call(
            "products", "ptr %context", f"ptr {v}", f"ptr {u}", f"ptr {initial}", "ptr %m", f"i64 {left}",
            f"i64 {columns}",
        )  # fmt: skip
        f.call(
            "finish", "ptr %context", "ptr %m", f"ptr {f.offset(c['bias'], begin)}", f"ptr {r}", f"ptr {y}",
            f"i64 {pixel}", f"i64 {left}", f"i64 {left_over}",
        )  # fmt: skip


def _finish(module: Module, isa: Isa, rounds: bool, given: bool) -> None:
    """The epilogue of the `%count` pixels from `%pixel` on, whose sums are in `%m`, for up to `%channels` channels.

    Pixels in the columns of padding are passed over.
    """
    f = module.function(
        "finish",
        "ptr %context, ptr noalias %m, ptr noalias %bias, ptr %r, ptr %y, i64 %pixel, i64 %count, i64 %channels",
    )
    c = ContextReader(
        f, "line", "out_width", "out_channels", "m_vector", "low", "high", "r", "bias_scale", "y_least", "y_most",
        *fields_of("z"),
    )  # fmt: skip
    vectors = range(isa.columns)
    lanes = [f.lanes(f.maximum(f.sub("%channels", k * isa.width), 0)) for k in vectors]
    tables = [epilogue_tables(f, c, f.offset("%bias", k * isa.width), rounds) for k in vectors]
    row, column = f.divmod("%pixel", c["line"])
    with f.loop("%count", carry=[("i64", row), ("i64", column)]) as pixel:
        row, column = pixel.values
        with f.when(f.compare("slt", column, c["out_width"])):
            place = f.mul(f.add(f.mul(row, c["out_width"]), column), c["out_channels"])
            sums = f.offset("%m", f.mul(pixel.index, isa.width))
            values = [
                adjusted(f, c, as_floats(f, f.offset(sums, f.mul(c["m_vector"], k))), tables[k], rounds)
                for k in vectors
            ]
            places = [f.add(place, k * isa.width) for k in vectors]
            values = clamped(f, c, residual_added(f, c, values, [f.offset("%r", one) for one in places], lanes))
            for k, (value, one) in enumerate(zip(values, places, strict=True)):
                to = f.offset("%y", one, kind_of(given))
                if not given:
                    f.vstore(value, to, lanes[k])
                    continue
                with f.when(f.compare("sgt", "%channels", k * isa.width)):
                    f.store(f"<{isa.width} x i8>", leveller(f, c, "z")(value), to, isa.width)
        pixel.next(f.following(row, column, c["line"]))


def kind_of(given: bool) -> str:
    """Of a number of the result."""
    return "i8" if given else "float"


def as_floats(f: Function, pointer: str) -> str:
    """A vector of 32-bit sums."""
    width = f.module.width
    return f.op(f"sitofp <{width} x i32> {f.load(f'<{width} x i32>', pointer, 4 * width)} to {f.module.vector}")


def epilogue_tables(f: Function, c: ContextReader, bias: str, rounds: bool) -> list[str]:
    """Factor and summand of a vector of channels, and those behind the rounding."""
    return [f.vload(f.offset(bias, f.mul(c["bias_scale"], k))) for k in range(4 if rounds else 2)]


def adjusted(f: Function, c: ContextReader, value: str, tables: list[str], rounds: bool) -> str:
    """`value` with its factor and summand, rounded if the output has levels."""
    value = f.vmuladd(value, tables[0], tables[1])
    if not rounds:
        return value
    value = between(f, f.vadd(value, f.splat(ROUNDER)), number(f, c, "y_least"), number(f, c, "y_most"))
    return f.vmuladd(f.vsub(value, f.splat(ROUNDER)), tables[2], tables[3])
