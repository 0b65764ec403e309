"""The loops around transforms and the product with tiles in the lanes, in IR: what one thread does.

A block has as many tiles as a vector has lanes, and `groups` blocks are taken through the product together. Behind the
input transform, and before the output's, squares are transposed while they are near.
"""

from __future__ import annotations

from tersenet.kernels.blocks import TASK, output_block, own_scratch, transform_block, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module
from tersenet.ops.cook_toom import Transforms


def scattered_functions(module: Module, isa: Isa, transforms: Transforms) -> None:
    """The tasks `run_private`, `run_input` and `run_product`, and what they share."""
    transform_block(module, isa, transforms)
    output_block(module, isa, transforms)
    _input(module, transforms)
    _product(module, isa, transforms)
    _outputs(module, isa, transforms)
    _run_private(module)
    _run_shared(module)


def _input(module: Module, transforms: Transforms) -> None:
    """V of the block `%number` for one vector of input channels, tiles in the lanes."""
    f = module.function("scattered_input", "ptr %context, ptr noalias %v, i64 %number, i64 %vector")
    c = ContextReader(f, "v_tap", "v_vector")
    f.call("transform_block", f"ptr %context, ptr %v, i64 %number, i64 %vector, i64 {f.add('%vector', 1)}")
    own = f.offset("%v", f.mul("%vector", c["v_vector"]))
    with f.loop(transforms.t**2) as tap:
        f.call("transpose", f"ptr {f.offset(own, f.mul(tap.index, c['v_tap']))}")


def _product(module: Module, isa: Isa, transforms: Transforms) -> None:
    """M of `%count` blocks for the blocks of output channels from `%begin` to `%end`: all taps, all input channels."""
    f = module.function(
        "scattered_product", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %count, i64 %begin, i64 %end"
    )
    c = ContextReader(
        f, "weight", "list", "starts", "v_tap", "m_tap", "m_block", "groups", "slices", "out_channels"
    )  # fmt: skip
    step = f.mul(c["m_block"], c["groups"])
    with f.loop(transforms.t**2) as tap, f.loop(c["slices"]) as part:
        v = f.offset("%v", f.mul(tap.index, c["v_tap"]))
        rows_before = f.mul(f.add(f.mul(tap.index, c["slices"]), part.index), c["out_channels"])
        with f.loop("%end", start="%begin") as output:
            channel = f.mul(output.index, isa.channels)
            rows = f.minimum(f.sub(c["out_channels"], channel), isa.channels)
            m = f.add(f.mul(f.sub(output.index, "%begin"), step), f.mul(tap.index, c["m_tap"]))
            f.call(
                "scattered", "ptr %context", f"ptr {v}", f"ptr {c['weight']}", f"ptr {c['list']}",
                f"ptr {f.offset(c['starts'], f.add(rows_before, channel), 'i64')}", f"ptr {f.offset('%m', m)}",
                f"i64 {rows}", f"i64 {part.index}", "i64 %count",
            )  # fmt: skip


def _outputs(module: Module, isa: Isa, transforms: Transforms) -> None:
    """`%count` blocks from `%first` on, for `output_step` blocks of output channels from `%begin` on, V to output."""
    f = module.function(
        "scattered_outputs", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %first, i64 %count, i64 %begin"
    )
    c = ContextReader(f, "outputs", "output_step", "m_tap", "m_vector", "m_block", "groups", "out_channels")
    end = f.minimum(f.add("%begin", c["output_step"]), c["outputs"])
    f.call("scattered_product", f"ptr %context, ptr %v, ptr %m, i64 %count, i64 %begin, i64 {end}")
    with f.loop(end, start="%begin") as output, f.loop("%count") as group:
        place = f.add(f.mul(f.sub(output.index, "%begin"), c["groups"]), group.index)
        m = f.offset("%m", f.mul(place, c["m_block"]))
        vectors = vectors_of(f, isa, output.index, c["out_channels"])
        with f.loop(transforms.t**2) as tap, f.loop(vectors) as column:
            square = f.add(f.mul(tap.index, c["m_tap"]), f.mul(column.index, c["m_vector"]))
            f.call("transpose", f"ptr {f.offset(m, square)}")
        number = f.add("%first", group.index)
        f.call("output_block", f"ptr %context, ptr {m}, i64 {number}, i64 {output.index}")


def _run_private(module: Module) -> None:
    """Each thread transforms some blocks and takes them through all output channels."""
    f = module.function("run_private", TASK, exported=True)
    c = ContextReader(f, "group_count", "outputs", "output_step", "vectors", "v_block", "groups")
    v = own_scratch(f)
    m = f.offset(v, f.mul(c["v_block"], c["groups"]))
    with f.claims(c.address("next_product"), c["group_count"]) as unit:
        first, count = _blocks_of(f, unit)
        with f.loop(count) as group, f.loop(c["vectors"]) as vector:
            own = f.offset(v, f.mul(group.index, c["v_block"]))
            number = f.add(first, group.index)
            f.call("scattered_input", f"ptr %context, ptr {own}, i64 {number}, i64 {vector.index}")
        with f.loop(c["outputs"], step=c["output_step"]) as output:
            f.call("scattered_outputs", f"ptr %context, ptr {v}, ptr {m}, i64 {first}, i64 {count}, i64 {output.index}")


def _run_shared(module: Module) -> None:
    """For few blocks: one V of all, then `output_step` blocks of output channels are a unit."""
    f = module.function("run_input", TASK, exported=True)
    c = ContextReader(f, "block_count", "vectors", "v_block", "shared")
    with f.claims(c.address("next_input"), f.mul(c["block_count"], c["vectors"])) as unit:
        number, vector = f.divmod(unit, c["vectors"])
        v = f.offset(c["shared"], f.mul(number, c["v_block"]))
        f.call("scattered_input", f"ptr %context, ptr {v}, i64 {number}, i64 {vector}")

    f = module.function("run_product", TASK, exported=True)
    c = ContextReader(f, "group_count", "outputs", "output_step", "v_block", "shared")
    m = own_scratch(f)
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["group_count"], steps)) as unit:
        step, group = f.divmod(unit, c["group_count"])
        first, count = _blocks_of(f, group)
        v = f.offset(c["shared"], f.mul(first, c["v_block"]))
        begin = f.mul(step, c["output_step"])
        f.call("scattered_outputs", f"ptr %context, ptr {v}, ptr {m}, i64 {first}, i64 {count}, i64 {begin}")


def _blocks_of(f: Function, unit: str) -> tuple[str, str]:
    """The first block of a unit of `groups` blocks, and how many it has: the last may have fewer."""
    c = ContextReader(f, "block_count", "groups")
    first = f.mul(unit, c["groups"])
    return first, f.minimum(c["groups"], f.sub(c["block_count"], first))
