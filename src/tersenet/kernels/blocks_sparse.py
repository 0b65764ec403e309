"""The loops around the product with a weight pruned in blocks, in IR."""

from __future__ import annotations

from tersenet.kernels.blocks import tiles_of_block, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Module
from tersenet.ops.cook_toom import Transforms


def sparse_product_block(module: Module, isa: Isa, transforms: Transforms) -> None:
    """M of the block `%number` for the blocks of output channels from `%begin` to `%end`.

    `starts` has the first entry of every tap and vector of output channels.
    """
    f = module.function(
        "product_block", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %number, i64 %begin, i64 %end"
    )
    c = ContextReader(
        f, "weight", "list", "starts", "v_tap", "v_vector", "m_tap", "m_vector", "m_block", "out_channels", "vectors"
    )  # fmt: skip
    count = tiles_of_block(f, "%number")
    groups = f.divmod(f.add(count, isa.rows - 1), isa.rows)[0]
    small, larger = f.divmod(count, groups)
    vectors = f.divmod(f.add(c["out_channels"], isa.width - 1), isa.width)[0]
    # What each vector of output channels has to fetch, so that together they fetch the next tap of V.
    asked = f.mul(f.sub("%end", "%begin"), isa.columns)
    lines = f.divmod(f.add(f.mul(c["vectors"], count), f.sub(asked, 1)), asked)[0]
    with f.loop(transforms.t**2) as tap, f.loop("%end", start="%begin") as output:
        v = f.offset("%v", f.mul(tap.index, c["v_tap"]))
        m = f.add(f.mul(f.sub(output.index, "%begin"), c["m_block"]), f.mul(tap.index, c["m_tap"]))
        m = f.offset("%m", m)
        with f.loop(vectors_of(f, isa, output.index, c["out_channels"])) as column:
            vector = f.add(f.mul(output.index, isa.columns), column.index)
            start = f.offset(c["starts"], f.add(f.mul(tap.index, vectors), vector), "i64")
            first, last = f.load("i64", start, 8), f.load("i64", f.offset(start, 1, "i64"), 8)
            own = f.offset(m, f.mul(column.index, c["m_vector"]))
            place = f.mul(f.add(f.mul(f.sub(output.index, "%begin"), isa.columns), column.index), lines)
            ahead = f.offset(v, f.add(c["v_tap"], f.mul(place, isa.width)))
            with f.loop(lines) as line:
                f.prefetch(f.offset(ahead, f.mul(line.index, isa.width)))
            with f.loop(groups, carry=[("i64", "0")]) as group:
                (done,) = group.values
                # Groups of equal size, but for one tile.
                rows = f.add(small, f.op(f"zext i1 {f.compare('slt', group.index, larger)} to i64"))
                place = f.mul(done, isa.width)
                f.call(
                    "sparse", "ptr %context", f"ptr {f.offset(v, place)}", f"ptr {c['weight']}", f"ptr {c['list']}",
                    f"ptr {f.offset(own, place)}", f"i64 {first}", f"i64 {last}", f"i64 {rows}",
                )  # fmt: skip
                group.next([f.add(done, rows)])
