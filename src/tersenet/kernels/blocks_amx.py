"""Products of the transformed tiles on AMX's matrix tiles, in IR: what replaces `product_block` of `blocks`."""

from __future__ import annotations

from tersenet.kernels.amx import GROUP, LINE, TILE, Tiles
from tersenet.kernels.blocks import tiles_of_block, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Module
from tersenet.ops.cook_toom import Transforms


def amx_product_block(module: Module, isa: Isa, transforms: Transforms, parts: int) -> None:
    """M of the block `%number` for the blocks of output channels from `%begin` to `%end`: all taps, all input channels.

    * U[block of output channels][tap][chunk of 32 inputs][low, high][column][pair of inputs][16 outputs x 2]
    * V[tap][chunk][high, low][tile][32]

    With `parts` 1 there is nothing low.
    """
    f = module.function(
        "product_block", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %number, i64 %begin, i64 %end"
    )
    c = ContextReader(f, "weight", "v_tap", "m_tap", "m_block", "chunks", "out_channels")
    tiles = Tiles(f)
    tiles.begin()
    count = tiles_of_block(f, "%number")
    panel = f.mul(c["chunks"], parts * isa.columns * TILE)
    output_panels = f.mul(panel, transforms.t**2)
    with f.loop(transforms.t**2) as tap, f.loop("%end", start="%begin") as output:
        u = f.offset(c["weight"], f.add(f.mul(output.index, output_panels), f.mul(tap.index, panel)))
        v = f.offset("%v", f.mul(tap.index, c["v_tap"]))
        columns = vectors_of(f, isa, output.index, c["out_channels"])
        m = f.add(f.mul(f.sub(output.index, "%begin"), c["m_block"]), f.mul(tap.index, c["m_tap"]))
        m = f.offset("%m", m)
        with f.loop(count, step=GROUP) as group:
            rows = f.divmod(f.add(f.minimum(f.sub(count, group.index), GROUP), LINE - 1), LINE)[0]
            place = f.mul(group.index, LINE)
            f.call(
                "product", "ptr %context", f"ptr {f.offset(v, place)}", f"ptr {u}", f"ptr {f.offset(m, place)}",
                f"i64 {rows}", f"i64 {columns}",
            )  # fmt: skip
    tiles.end()
