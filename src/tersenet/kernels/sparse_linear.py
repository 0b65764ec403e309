"""Linear layers with a pruned weight, in IR: y = x W^T + b, a vector of outputs at a time, with the epilogue.

The weight comes from memory, once for up to `rows_of` rows of x, and in order; nothing else costs much. What is left of
the weight of one vector of outputs makes its entries:

* "sparse": blocks of one input by the vector's outputs that are not all zero. U[entry][width], the list[entry]: the
  input.
* "scattered": single weights; each lane is an output of its own, and outputs with about as many weights share a vector
  (sliced ELLPACK). U[entry][width], padded with zeros, the list[entry][width]: each lane's input. Behind the starts is
  the place of each lane's output, places[vector][width].

starts[vector]: its first entry. Inputs are unsigned numbers of `index` bits. Every row of x is summed in the same order
whatever is computed beside it, so that results are the same for any number of threads and rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tersenet.kernels.blocks import TASK
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

LINEAR_TASKS = ("run_linear",)
_CHAINS = 4  # entries that are summed beside each other: an addition has to wait for the one before
_AHEAD = 512  # floats of the weight
_PARAMETERS = "ptr %context, i64 %row, i64 %vector"


@dataclass(frozen=True)
class SparseLinear:
    """The code for one set of vector instructions; sizes are arguments. `index`: bits of an input's number."""

    isa: Isa
    kept: str  # "sparse" or "scattered"
    index: int  # 16 or 32

    @property
    def name(self) -> str:
        return f"linear-{self.kept}{self.index}-{self.isa.name}"


def rows_of(isa: Isa) -> int:
    """Rows of x for which the weight is read once: their sums stay in registers."""
    return isa.rows // 3


def generate_linear(algorithm: SparseLinear) -> str:
    """The text of its module, with the one task `run_linear`."""
    isa = algorithm.isa
    bits = isa.width * 32
    module = Module(isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    most = rows_of(isa)
    for rows in range(1, most + 1):
        _kernel(module, algorithm, rows)
    f = module.function("run_linear", TASK, exported=True)
    c = ContextReader(f, "tiles", "outputs", "output_step")
    steps = f.divmod(f.add(c["outputs"], f.sub(c["output_step"], 1)), c["output_step"])[0]

    def case(rows: int, row: str, vector: str) -> Callable[[], None]:
        return lambda: f.call(f"linear_{rows}", "ptr %context", f"i64 {row}", f"i64 {vector}")

    with f.claims(c.address("next_product"), steps) as unit:
        begin = f.mul(unit, c["output_step"])
        end = f.minimum(f.add(begin, c["output_step"]), c["outputs"])
        with f.loop(end, start=begin) as vector, f.loop(c["tiles"], step=most) as row:
            count = f.minimum(f.sub(c["tiles"], row.index), most)
            f.switch(count, {rows: case(rows, row.index, vector.index) for rows in range(1, most + 1)})
    return module.text()


def _kernel(module: Module, algorithm: SparseLinear, rows: int) -> None:
    """One vector of outputs for `rows` rows of x from `%row` on."""
    f = module.function(f"linear_{rows}", _PARAMETERS)
    c = ContextReader(
        f, "x", "x_row", "y", "y_row", "weight", "list", "starts", "bias", "outputs", "out_channels", "low", "high"
    )
    v, width = module.vector, module.width
    inputs = [f.offset(c["x"], f.mul(f.add("%row", k), c["x_row"])) for k in range(rows)]
    start = f.offset(c["starts"], "%vector", "i64")
    first, last = f.load("i64", start, 8), f.load("i64", f.offset(start, 1, "i64"), 8)
    even = f.sub(last, f.divmod(f.sub(last, first), _CHAINS)[1])
    with f.loop(even, start=first, step=_CHAINS, carry=[(v, "zeroinitializer")] * (_CHAINS * rows)) as loop:
        following: list[str] = []
        for chain in range(_CHAINS):
            own = loop.values[chain * rows : (chain + 1) * rows]
            following += _entry(f, c, algorithm, f.add(loop.index, chain), inputs, own)
        loop.next(following)
    total = loop.values
    while len(total) > rows:
        half = len(total) // 2
        total = [f.vadd(a, b) for a, b in zip(total[:half], total[half:], strict=True)]
    with f.loop(last, start=even, carry=[(v, value) for value in total]) as rest:
        rest.next(_entry(f, c, algorithm, rest.index, inputs, rest.values))
    begin = f.mul("%vector", width)
    bias = f.vload(f.offset(c["bias"], begin))
    lanes = f.lanes(f.sub(c["out_channels"], begin))
    values = clamped(f, c, [f.vadd(value, bias) for value in rest.values])
    for row, value in enumerate(values):
        y = f.offset(c["y"], f.mul(f.add("%row", row), c["y_row"]))
        if algorithm.kept == "sparse":
            f.vstore(value, f.offset(y, begin), lanes)
        else:
            places = f.offset(f.offset(c["starts"], f.add(c["outputs"], 1), "i64"), begin, "i64")
            f.vscatter(value, y, f.load(f"<{width} x i64>", places, 8), lanes)


def _entry(
    f: Function, c: ContextReader, algorithm: SparseLinear, index: str, inputs: list[str], sums: list[str]
) -> list[str]:
    """The sums with one more entry in them."""
    width, kind = f.module.width, f"i{algorithm.index}"
    line = f.offset(c["weight"], f.mul(index, width))
    f.prefetch(f.offset(line, _AHEAD), near=False)
    weight = f.vload(line)
    if algorithm.kept == "sparse":
        place = f.op(f"zext {kind} {f.load(kind, f.offset(c['list'], index, kind), 2)} to i64")
        values = [f.spread(f.load("float", f.offset(x, place))) for x in inputs]
    else:
        places = f.load(f"<{width} x {kind}>", f.offset(c["list"], f.mul(index, width), kind), 2)
        wide = f.op(f"zext <{width} x {kind}> {places} to <{width} x i64>")
        values = [f.vgather(x, wide) for x in inputs]
    return [f.vmuladd(value, weight, total) for value, total in zip(values, sums, strict=True)]
