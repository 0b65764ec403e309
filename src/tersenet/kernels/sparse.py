"""The product kernels of a pruned weight, in IR: M = U V for one tap, a group of tiles and a vector of output channels.

Only the input channels are visited that have a weight for one of the vector's output channels: a list says which. The
sums of all tiles of the group stay in registers. Layouts:

* U[entry][width]: the kept weights of one vector and tap follow each other.
* the list[entry]: the input channel, a 32-bit integer. V and M: as in the dense product.
"""

from __future__ import annotations

from collections.abc import Callable

from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

_AHEAD = 96  # entries; the weights are read in order, and come from afar
_PARAMETERS = "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %list, ptr noalias %m, i64 %first, i64 %last"


def sparse_kernels(module: Module, isa: Isa) -> None:
    """`sparse`: dispatches to a kernel for 1 ... `isa.rows` tiles; `%first` and `%last` are the entries to take."""
    for rows in range(1, isa.rows + 1):
        _kernel(module, isa, rows)
    f = module.function("sparse", f"{_PARAMETERS}, i64 %rows", inline=True)
    typed = _PARAMETERS.replace("noalias ", "").split(", ")

    def case(rows: int) -> Callable[[], None]:
        return lambda: f.call(f"sparse_{rows}", *typed)

    f.switch("%rows", {rows: case(rows) for rows in range(1, isa.rows + 1)})


def _kernel(module: Module, isa: Isa, rows: int) -> None:
    f = module.function(f"sparse_{rows}", _PARAMETERS)
    c = ContextReader(f, "v_vector")
    v = module.vector
    # Every second entry has a sum of its own: twice as many are independent, and none waits for the one before. The
    # order of a tile's sum is the same in all kernels, so that results don't depend on how tiles are grouped.
    even = f.sub("%last", f.divmod(f.sub("%last", "%first"), 2)[1])
    with f.loop(even, start="%first", step=2, carry=[(v, "zeroinitializer")] * (2 * rows)) as loop:
        a = _entry(f, c, isa, loop.index, loop.values[:rows])
        b = _entry(f, c, isa, f.add(loop.index, 1), loop.values[rows:])
        loop.next([*a, *b])
    total = [f.vadd(a, b) for a, b in zip(loop.values[:rows], loop.values[rows:], strict=True)]
    with f.loop("%last", start=even, carry=[(v, value) for value in total]) as rest:
        rest.next(_entry(f, c, isa, rest.index, rest.values))
    total = rest.values
    for row, value in enumerate(total):
        f.vstore(value, f.offset("%m", row * isa.width), align=4 * isa.width)


def _entry(f: Function, c: ContextReader, isa: Isa, index: str, sums: list[str]) -> list[str]:
    """The sums with one more input channel in them."""
    channel = f.op(f"zext i32 {f.load('i32', f.offset('%list', index, 'i32'))} to i64")
    vector, lane = f.divmod(channel, isa.width)
    tile = f.offset(f.offset("%v", f.mul(vector, c["v_vector"])), lane)
    line = f.offset("%u", f.mul(index, isa.width))
    f.prefetch(f.offset(line, _AHEAD * isa.width))
    weight = f.vload(line)
    return [
        f.vmuladd(f.spread(f.load("float", f.offset(tile, row * isa.width))), weight, value)
        for row, value in enumerate(sums)
    ]
