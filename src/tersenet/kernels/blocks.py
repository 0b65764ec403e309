"""The loops around transforms and products, in IR: what one thread does.

A block is `block` consecutive tiles. Its transformed input V takes `v_block` floats; the products M of a block and one
block of output channels take the rest of a thread's scratch. Work is handed out in units by shared counters, and what a
unit computes does not depend on who takes it: results are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import AMX, Isa
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.product import QUAD
from tersenet.ops.cook_toom import Transforms

# A function with this signature is what OpenMP runtimes call in each thread.
TASK = "ptr %context"


def block_functions(module: Module, isa: Isa, transforms: Transforms) -> None:
    """The tasks `run_private`, `run_input` and `run_product`, and what they share but for `product_block`."""
    transform_block(module, isa, transforms)
    output_block(module, isa, transforms)
    _outputs_from(module)
    _run_private(module)
    _run_shared(module)


def transform_block(module: Module, isa: Isa, transforms: Transforms) -> None:
    """V of the block `%number`, for the vectors of input channels from `%begin` to `%end`.

    For AMX a tile's line has the parts of two vectors.
    """
    f = module.function("transform_block", "ptr %context, ptr noalias %v, i64 %number, i64 %begin, i64 %end")
    c = ContextReader(
        f, "x", "x_image", "x_row", "x_column", "height", "width", "channels", "pad_top", "pad_left", "v_vector"
    )
    with _tiles(f, transforms, "%number") as (tile, image, row, column):
        top, left = f.sub(row, c["pad_top"]), f.sub(column, c["pad_left"])
        pixels = f.offset(c["x"], f.mul(image, c["x_image"]))
        first = f.offset(pixels, f.add(f.mul(top, c["x_row"]), f.mul(left, c["x_column"])))
        inside = f.both(_fits(f, top, c["height"], transforms.t), _fits(f, left, c["width"], transforms.t))
        with f.loop("%end", start="%begin") as loop:
            channel = f.mul(loop.index, isa.width)
            left_over = f.sub(c["channels"], channel)
            full = f.compare("sge", left_over, isa.width)
            vector, half = loop.index, "0"
            if isa.name == AMX.name:
                vector, half = f.divmod(loop.index, 2)
            place = f.add(f.mul(vector, c["v_vector"]), f.mul(half, isa.width // 2))
            v = f.offset("%v", f.add(place, f.mul(tile, isa.width)))
            f.switch(
                f.op(f"zext i1 {f.both(inside, full)} to i64"),
                {
                    0: lambda: f.call(
                        "input_careful", f"ptr %context, ptr {f.offset(first, channel)}, ptr {v}",
                        f"i64 {top}, i64 {left}, i64 {left_over}",
                    ),
                    1: lambda: f.call("input_inner", f"ptr %context, ptr {f.offset(first, channel)}, ptr {v}"),
                },
            )  # fmt: skip


def product_block(module: Module, isa: Isa, transforms: Transforms, weight: str) -> None:
    """M of the block `%number` for the blocks of output channels from `%begin` to `%end`: all taps, all input channels.

    Taps are outside: a tap of V comes from afar once, and is near for all but the first of the output channels.
    """
    f = module.function(
        "product_block", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %number, i64 %begin, i64 %end"
    )
    c = ContextReader(f, "weight", "v_tap", "v_vector", "m_tap", "m_block", "quads", "quad_step", "out_channels")
    count = tiles_of_block(f, "%number")
    groups = f.divmod(f.add(count, isa.rows - 1), isa.rows)[0]
    small, larger = f.divmod(count, groups)
    panel = f.mul(c["quads"], QUAD * isa.channels)
    output_panels = f.mul(panel, transforms.t**2)
    # What a group of tiles has to fetch for each input channel, so that all groups together fetch one slice.
    pace = f.divmod(f.add(groups, isa.channels - 1), groups)[0]
    with f.loop(transforms.t**2) as tap, f.loop("%end", start="%begin") as output:
        u = f.offset(c["weight"], f.add(f.mul(output.index, output_panels), f.mul(tap.index, panel)), weight)
        v = f.offset("%v", f.mul(tap.index, c["v_tap"]))
        columns = vectors_of(f, isa, output.index, c["out_channels"])
        m = f.add(f.mul(f.sub(output.index, "%begin"), c["m_block"]), f.mul(tap.index, c["m_tap"]))
        m = f.offset("%m", m)
        # A slice of U stays in the first-level cache while all tiles of the block pass by.
        with f.loop(c["quads"], step=c["quad_step"]) as part:
            last = f.minimum(f.add(part.index, c["quad_step"]), c["quads"])
            length = f.mul(f.sub(last, part.index), QUAD * isa.channels)
            # Taps of one output channel follow each other in memory; else the next one is an output channel further.
            is_inside = f.compare("slt", last, c["quads"])
            is_followed = f.op(f"select i1 {is_inside}, i1 true, i1 {f.compare('eq', f.add('%begin', 1), '%end')}")
            step = f.op(f"select i1 {is_followed}, i64 {length}, i64 {output_panels}")
            ahead = f.offset(u, f.add(f.mul(part.index, QUAD * isa.channels), step), weight)
            with f.loop(groups, carry=[("i64", "0")]) as group:
                (done,) = group.values
                # Groups of equal size, but for one tile.
                more = f.op(f"zext i1 {f.compare('slt', group.index, larger)} to i64")
                rows = f.add(small, more)
                place = f.mul(done, isa.width)
                channels = f.mul(f.sub(last, part.index), QUAD)
                own_ahead = f.offset(ahead, f.mul(group.index, f.mul(channels, pace)), weight)
                f.call(
                    "product", "ptr %context", f"ptr {f.offset(v, place)}", f"ptr {u}", f"ptr {f.offset(m, place)}",
                    f"i64 {part.index}, i64 {last}, ptr {own_ahead}, i64 {pace}, i64 {columns}, i64 {rows}",
                )  # fmt: skip
                group.next([f.add(done, rows)])


def output_block(module: Module, isa: Isa, transforms: Transforms) -> None:
    """Output and epilogue of the block `%number` for the block `%output` of output channels."""
    f = module.function("output_block", "ptr %context, ptr noalias %m, i64 %number, i64 %output")
    c = ContextReader(
        f, "y", "y_image", "y_row", "y_column", "r", "r_image", "r_row", "r_column", "bias",
        "out_height", "out_width", "out_channels", "m_vector", "silu",
    )  # fmt: skip
    m = transforms.m
    begin = f.mul("%output", isa.channels)
    vectors = vectors_of(f, isa, "%output", c["out_channels"])
    with _tiles(f, transforms, "%number") as (tile, image, row, column):
        places = {
            name: f.offset(
                c[name],
                f.add(
                    f.mul(image, c[f"{name}_image"]),
                    f.add(f.mul(row, c[f"{name}_row"]), f.mul(column, c[f"{name}_column"])),
                ),
            )
            for name in ("y", "r")
        }
        rows, columns = f.sub(c["out_height"], row), f.sub(c["out_width"], column)
        whole = f.both(f.compare("sge", rows, m), f.compare("sge", columns, m))
        plain = f.both(whole, f.compare("eq", c["silu"], 0))
        with f.loop(vectors) as loop:
            channel = f.add(begin, f.mul(loop.index, isa.width))
            left_over = f.sub(c["out_channels"], channel)
            full = f.compare("sge", left_over, isa.width)
            products = f.offset("%m", f.add(f.mul(loop.index, c["m_vector"]), f.mul(tile, isa.width)))
            pointers = (
                f"ptr %context, ptr {products}, ptr {f.offset(c['bias'], channel)}, "
                f"ptr {f.offset(places['r'], channel)}, ptr {f.offset(places['y'], channel)}"
            )
            f.switch(
                f.op(f"zext i1 {f.both(plain, full)} to i64"),
                {
                    0: lambda: f.call("output_careful", pointers, f"i64 {rows}", f"i64 {columns}", f"i64 {left_over}"),
                    1: lambda: f.call("output_inner", pointers),
                },
            )


def _outputs_from(module: Module) -> None:
    """The block `%number` for `output_step` blocks of output channels from `%begin` on, from V to the output."""
    f = module.function("outputs_from", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %number, i64 %begin")
    c = ContextReader(f, "outputs", "output_step", "m_block")
    end = f.minimum(f.add("%begin", c["output_step"]), c["outputs"])
    f.call("product_block", f"ptr %context, ptr %v, ptr %m, i64 %number, i64 %begin, i64 {end}")
    with f.loop(end, start="%begin") as output:
        m = f.offset("%m", f.mul(f.sub(output.index, "%begin"), c["m_block"]))
        f.call("output_block", f"ptr %context, ptr {m}, i64 %number, i64 {output.index}")


def _run_private(module: Module) -> None:
    """Each thread transforms a block of tiles and takes it through all output channels while it is in its cache."""
    f = module.function("run_private", TASK, exported=True)
    c = ContextReader(f, "block_count", "outputs", "output_step", "vectors", "v_block")
    v = own_scratch(f)
    m = f.offset(v, c["v_block"])
    with f.claims(c.address("next_product"), c["block_count"]) as number:
        f.call("transform_block", f"ptr %context, ptr {v}, i64 {number}, i64 0, i64 {c['vectors']}")
        with f.loop(c["outputs"], step=c["output_step"]) as output:
            f.call("outputs_from", f"ptr %context, ptr {v}, ptr {m}, i64 {number}, i64 {output.index}")


def _run_shared(module: Module) -> None:
    """For few tiles: one V of all blocks, then `output_step` blocks of output channels are a unit: U is read once."""
    f = module.function("run_input", TASK, exported=True)
    c = ContextReader(f, "block_count", "vectors", "v_block", "shared")
    with f.claims(c.address("next_input"), f.mul(c["block_count"], c["vectors"])) as unit:
        number, vector = f.divmod(unit, c["vectors"])
        v = f.offset(c["shared"], f.mul(number, c["v_block"]))
        f.call("transform_block", f"ptr %context, ptr {v}, i64 {number}, i64 {vector}, i64 {f.add(vector, 1)}")

    f = module.function("run_product", TASK, exported=True)
    c = ContextReader(f, "block_count", "outputs", "output_step", "v_block", "shared")
    m = own_scratch(f)
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["block_count"], steps)) as unit:
        step, number = f.divmod(unit, c["block_count"])
        v = f.offset(c["shared"], f.mul(number, c["v_block"]))
        begin = f.mul(step, c["output_step"])
        f.call("outputs_from", f"ptr %context, ptr {v}, ptr {m}, i64 {number}, i64 {begin}")


@contextmanager
def _tiles(f: Function, transforms: Transforms, number: str) -> Generator[tuple[str, str, str, str]]:
    """A loop over the tiles of a block: place in the block, image, and the first row and column of the output."""
    c = ContextReader(f, "block", "tiles_high", "tiles_wide")
    before = f.mul(number, c["block"])
    with f.loop(tiles_of_block(f, number)) as loop:
        line, column = f.divmod(f.add(before, loop.index), c["tiles_wide"])
        image, row = f.divmod(line, c["tiles_high"])
        yield loop.index, image, f.mul(row, transforms.m), f.mul(column, transforms.m)


def tiles_of_block(f: Function, number: str) -> str:
    """`block`, or what is left for the last block."""
    c = ContextReader(f, "block", "tiles")
    return f.minimum(c["block"], f.sub(c["tiles"], f.mul(number, c["block"])))


def vectors_of(f: Function, isa: Isa, output: str, out_channels: str) -> str:
    """`columns`, or what the last block of output channels needs."""
    left_over = f.sub(out_channels, f.mul(output, isa.channels))
    return f.minimum(f.divmod(f.add(left_over, isa.width - 1), isa.width)[0], isa.columns)


def _fits(f: Function, start: str, size: str, length: int) -> str:
    """Whether `length` pixels from `start` on are inside."""
    return f.both(f.compare("sge", start, 0), f.compare("sle", f.add(start, length), size))


def own_scratch(f: Function) -> str:
    """This thread's part of the scratch memory: threads draw numbers."""
    c = ContextReader(f, "scratch", "scratch_stride")
    slot = f.op(f"atomicrmw add ptr {c.address('next_slot')}, i64 1 monotonic")
    return f.offset(c["scratch"], f.mul(slot, c["scratch_stride"]))
