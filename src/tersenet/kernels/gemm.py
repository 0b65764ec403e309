"""Dense convolutions as a product of matrices, in IR: pixels by weights, with the epilogue, in one pass.

A block of output pixels is copied into V: what the kernel covers there, row by row of the kernel (a segment; for 1x1
the pixel's channels). V is in groups of up to `rows` pixels, which the product reads in order. Then each block of
output channels passes by: a group's sums stay in registers until they are written, with bias, residual and activation.
Work is handed out as in `blocks`: results are the same for any number of threads and any cut.

* U[block of output channels][segment][float of the segment][columns x width]
* V[group][segment][vector of the segment][pixel of the group][width]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tersenet.kernels.blocks import TASK, own_scratch, vectors_of
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, finished, residual_added
from tersenet.kernels.gemm_copy import copy_function
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.product import QUAD

GEMM_TASKS = ("run_gemm",)
_LINE = 16  # floats in a cache line


@dataclass(frozen=True)
class Gemm:
    """The code for one set of vector instructions; sizes are arguments."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"gemm-{self.isa.name}"


def generate_gemm(algorithm: Gemm) -> str:
    """The text of its module, with the one task `run_gemm`."""
    isa = algorithm.isa
    bits = isa.width * 32
    # Without these, LLVM would split 512-bit vectors in two on some processors.
    module = Module(isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    copy_function(module, isa)
    _kernels(module, isa)
    _finish(module, isa)
    _outputs(module, isa)
    _run(module, isa)
    return module.text()


_PARAMETERS = (
    "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %bias, ptr %r, ptr %y, ptr noalias %m, "
    "ptr noalias %ahead, i64 %pace"
)  # the output may be written over the residual


def _kernels(module: Module, isa: Isa) -> None:
    """`product`: dispatches to a kernel for 1 ... `rows` pixels and 1 ... `columns` vectors of output channels.

    With `%m` null the result goes to `%y`; else the bare sums go to `%m`, from where `finish` takes them.
    """
    kinds = list(itertools.product(range(1, isa.columns + 1), range(1, isa.rows + 1)))
    for columns, rows in kinds:
        _kernel(module, isa, columns, rows)
    f = module.function("product", f"{_PARAMETERS}, i64 %columns, i64 %rows", inline=True)
    typed = _PARAMETERS.replace("noalias ", "").split(", ")
    number = f.add(f.mul("%columns", isa.rows), "%rows")
    f.switch(
        number,
        {
            columns * isa.rows + rows: lambda columns=columns, rows=rows: f.call(f"product_{columns}_{rows}", *typed)
            for columns, rows in kinds
        },
    )


def _kernel(module: Module, isa: Isa, columns: int, rows: int) -> None:
    f = module.function(f"product_{columns}_{rows}", _PARAMETERS)
    c = ContextReader(f, "quads", "vectors", "size_high", "out_channels", "low", "high", "r")
    width, v = isa.width, module.vector
    places = list(itertools.product(range(rows), range(columns)))

    def pixels(base: str) -> list[str]:
        lines = [f.offset(base, f.mul(c["out_channels"], row)) for row in range(rows)]
        return [f.offset(lines[row], column * width) for row, column in places]

    outputs, residuals = pixels("%y"), pixels("%r")
    for line in outputs:
        f.prefetch(line, write=True)
    with f.when(f.op(f"icmp ne ptr {c['r']}, null")):
        for line in residuals:
            f.prefetch(line)
    per_vector = width // QUAD
    segment = f.mul(c["vectors"], isa.rows * width)
    start = [(v, "zeroinitializer")] * len(places)
    with f.loop(c["size_high"], carry=start) as segments:
        begin = f.mul(segments.index, c["quads"])
        tiles = f.offset("%v", f.mul(segments.index, segment))
        with f.loop(c["quads"], carry=[(v, value) for value in segments.values]) as loop:
            vector, quad = f.divmod(loop.index, per_vector)
            tile = f.offset(f.offset(tiles, f.mul(vector, isa.rows * width)), f.mul(quad, QUAD))
            channel = f.mul(f.add(begin, loop.index), QUAD)
            weights = f.offset("%u", f.mul(channel, isa.channels))
            ahead = f.offset("%ahead", f.mul(channel, "%pace"))
            total = list(loop.values)
            for k in range(QUAD):
                for line in range(0, isa.channels, _LINE):
                    f.prefetch(f.offset(f.offset(ahead, f.mul("%pace", k)), line), near=False)
                loaded = [f.vload(f.offset(weights, k * isa.channels + column * width)) for column in range(columns)]
                for row in range(rows):
                    value = f.spread(f.load("float", f.offset(tile, row * width + k)))
                    for column in range(columns):
                        place = row * columns + column
                        total[place] = f.vmuladd(value, loaded[column], total[place])
            loop.next(total)
        segments.next(loop.values)
    sums = segments.values
    is_bare = f.op("icmp ne ptr %m, null")
    with f.when(is_bare):
        for value, (row, column) in zip(sums, places, strict=True):
            f.vstore(value, f.offset("%m", row * isa.channels + column * width), align=4 * width)
    with f.when(f.op(f"xor i1 {is_bare}, true")):
        bias = [f.vload(f.offset("%bias", column * width)) for column in range(columns)]
        values = [f.vadd(value, bias[column]) for value, (_, column) in zip(sums, places, strict=True)]
        for value, place in zip(clamped(f, c, residual_added(f, c, values, residuals)), outputs, strict=True):
            f.vstore(value, place)


def _finish(module: Module, isa: Isa) -> None:
    """The epilogue of `%rows` pixels whose sums are in `%m`, for up to `%channels` channels."""
    f = module.function(
        "finish",
        "ptr %context, ptr noalias %m, ptr noalias %bias, ptr %r, ptr %y, i64 %rows, i64 %channels",
    )
    c = ContextReader(f, "out_channels", "low", "high", "silu", "r")
    columns = f.minimum(f.divmod(f.add("%channels", isa.width - 1), isa.width)[0], isa.columns)
    with f.loop(columns) as column:
        begin = f.mul(column.index, isa.width)
        lanes = f.lanes(f.sub("%channels", begin))
        bias = f.vload(f.offset("%bias", begin))
        with f.loop("%rows") as row:
            place = f.add(f.mul(row.index, c["out_channels"]), begin)
            sums = f.vload(f.offset("%m", f.add(f.mul(row.index, isa.channels), begin)), align=4 * isa.width)
            (value,) = finished(f, c, [f.vadd(sums, bias)], [f.offset("%r", place)], [lanes])
            f.vstore(value, f.offset("%y", place), lanes)


def _outputs(module: Module, isa: Isa) -> None:
    """The block `%output` of output channels for the `%count` pixels from `%pixel` on, whose V is there."""
    f = module.function("outputs", "ptr %context, ptr noalias %v, ptr noalias %m, i64 %pixel, i64 %count, i64 %output")
    c = ContextReader(f, "weight", "bias", "r", "y", "quads", "vectors", "size_high", "out_channels", "silu")
    channels = f.mul(f.mul(c["size_high"], c["quads"]), QUAD)
    panel = f.mul(channels, isa.channels)
    u = f.offset(c["weight"], f.mul("%output", panel))
    begin = f.mul("%output", isa.channels)
    left_over = f.sub(c["out_channels"], begin)
    columns = vectors_of(f, isa, "%output", c["out_channels"])
    whole = f.compare("sge", left_over, f.mul(columns, isa.width))
    is_plain = f.both(whole, f.compare("eq", c["silu"], 0))
    m = f.op(f"select i1 {is_plain}, ptr null, ptr %m")
    bias = f.offset(c["bias"], begin)
    groups = _groups(f, isa, "%count")
    # What a group has to fetch for each input channel, so that all groups together fetch the next panel.
    pace = f.divmod(f.add(groups[0], isa.channels - 1), groups[0])[0]
    group_floats = f.mul(f.mul(c["size_high"], c["vectors"]), isa.rows * isa.width)
    with f.loop(groups[0]) as group:
        start, rows = _group(f, groups, group.index)
        v = f.offset("%v", f.mul(group.index, group_floats))
        place = f.add(f.mul(f.add("%pixel", start), c["out_channels"]), begin)
        r, y = f.offset(c["r"], place), f.offset(c["y"], place)
        ahead = f.offset(u, f.add(panel, f.mul(group.index, f.mul(channels, pace))))
        f.call(
            "product", "ptr %context", f"ptr {v}", f"ptr {u}", f"ptr {bias}", f"ptr {r}", f"ptr {y}", f"ptr {m}",
            f"ptr {ahead}", f"i64 {pace}", f"i64 {columns}", f"i64 {rows}",
        )  # fmt: skip
        with f.when(f.op(f"xor i1 {is_plain}, true")):
            f.call(
                "finish", "ptr %context", "ptr %m", f"ptr {bias}", f"ptr {r}", f"ptr {y}", f"i64 {rows}",
                f"i64 {left_over}",
            )  # fmt: skip


def _run(module: Module, isa: Isa) -> None:
    """Units are blocks of pixels times steps of output channels; the block that a thread had last is still in its V."""
    f = module.function("run_gemm", TASK, exported=True)
    c = ContextReader(f, "tiles", "block", "block_count", "outputs", "output_step", "vectors", "v_block", "size_high")
    own = own_scratch(f)
    v = f.offset(own, _LINE)  # the first line has the number of the block in V
    m = f.offset(v, c["v_block"])
    f.store("i64", "-1", own, 8)
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]
    with f.claims(c.address("next_product"), f.mul(c["block_count"], steps)) as unit:
        number, step = f.divmod(unit, steps)
        pixel = f.mul(number, c["block"])
        count = f.minimum(c["block"], f.sub(c["tiles"], pixel))
        with f.when(f.compare("ne", f.load("i64", own, 8), number)):
            f.store("i64", number, own, 8)
            groups = _groups(f, isa, count)
            with f.loop(groups[0]) as group:
                start, rows = _group(f, groups, group.index)
                floats = f.mul(f.mul(c["size_high"], c["vectors"]), isa.rows * isa.width)
                place = f.offset(v, f.mul(group.index, floats))
                f.call("copy", "ptr %context", f"ptr {place}", f"i64 {f.add(pixel, start)}", f"i64 {rows}")
        begin = f.mul(step, c["output_step"])
        end = f.minimum(f.add(begin, c["output_step"]), c["outputs"])
        with f.loop(end, start=begin) as output:
            f.call(
                "outputs", "ptr %context", f"ptr {v}", f"ptr {m}", f"i64 {pixel}", f"i64 {count}",
                f"i64 {output.index}",
            )  # fmt: skip


Groups = tuple[str, str, str]


def _groups(f: Function, isa: Isa, count: str) -> Groups:
    """How many groups `count` pixels make, the pixels of a small one, and how many have one more."""
    groups = f.divmod(f.add(count, isa.rows - 1), isa.rows)[0]
    return groups, *f.divmod(count, groups)


def _group(f: Function, groups: Groups, index: str) -> tuple[str, str]:
    """The first pixel of a group, and how many it has."""
    _, small, larger = groups
    more = f.op(f"zext i1 {f.compare('slt', index, larger)} to i64")
    return f.add(f.mul(index, small), f.minimum(index, larger)), f.add(small, more)
