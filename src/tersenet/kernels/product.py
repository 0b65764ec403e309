"""The product kernels: M = U V for one tap, a group of tiles and one block of output channels, in IR.

The sums of up to `rows` tiles times `columns` vectors of output channels stay in registers. Layouts:

* U[input channel][columns x width]: read in order.
* V[vector of input channels][tile][width]: one lane is loaded into all lanes; displacements are constants.
* M[column][tile][width].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Module

# Input channels that one pass of the loop takes; the packed weights are padded to a multiple.
QUAD = 4
_LINE_BYTES = 64
_VECTORS_AHEAD = 2  # of V, which may come from afar
# How weights may be kept, and the bytes of one. They are made floats as they are loaded.
WEIGHT_BYTES = {"float": 4, "half": 2}


def product_kernels(module: Module, isa: Isa, weight: str) -> None:
    """`product`: dispatches to a kernel for 1 ... `isa.rows` tiles and 1 ... `isa.columns` vectors.

    `%first` and `%last` are the quads of input channels to take; from quad 0 M is set, else added to. `%ahead` is what
    will be read later: `%pace` weights of it are brought into the cache for each input channel.
    """
    parameters = (
        "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %m, i64 %first, i64 %last, "
        "ptr noalias %ahead, i64 %pace"
    )
    kinds = list(itertools.product(range(1, isa.columns + 1), range(1, isa.rows + 1)))
    for columns, rows in kinds:
        _kernel(module, isa, weight, columns, rows, parameters)
    f = module.function("product", f"{parameters}, i64 %columns, i64 %rows", inline=True)
    typed = parameters.replace("noalias ", "").split(", ")

    def case(columns: int, rows: int) -> Callable[[], None]:
        return lambda: f.call(f"product_{columns}_{rows}", *typed)

    number = f.add(f.mul("%columns", isa.rows), "%rows")
    f.switch(number, {columns * isa.rows + rows: case(columns, rows) for columns, rows in kinds})


def _kernel(module: Module, isa: Isa, weight: str, columns: int, rows: int, parameters: str) -> None:
    f = module.function(f"product_{columns}_{rows}", parameters)
    c = ContextReader(f, "v_vector", "m_vector")
    width, v = isa.width, module.vector
    places = [
        f.offset(f.offset("%m", f.mul(c["m_vector"], column)), row * width)
        for row in range(rows)
        for column in range(columns)
    ]
    start = f.choose(
        f.compare("eq", "%first", 0),
        v,
        lambda: ["zeroinitializer"] * len(places),
        lambda: [f.vload(place, align=4 * width) for place in places],
    )
    per_vector = width // QUAD
    paces = [f.mul("%pace", k) for k in range(QUAD)]
    with f.loop("%last", start="%first", carry=[(v, value) for value in start]) as loop:
        vector, quad = f.divmod(loop.index, per_vector)
        tile = f.offset(f.offset("%v", f.mul(vector, c["v_vector"])), f.mul(quad, QUAD))
        following = f.offset(
            "%v", f.add(f.mul(f.add(vector, _VECTORS_AHEAD), c["v_vector"]), f.mul(quad, QUAD * width))
        )
        weights = f.offset("%u", f.mul(loop.index, QUAD * isa.channels), weight)
        ahead = f.offset("%ahead", f.mul(f.mul(f.sub(loop.index, "%first"), QUAD), "%pace"), weight)
        total = list(loop.values)
        for k in range(QUAD):
            for line in range(0, isa.channels, _LINE_BYTES // WEIGHT_BYTES[weight]):
                f.prefetch(f.offset(f.offset(ahead, paces[k], weight), line, weight))
            f.prefetch(f.offset(following, k * width))  # a tile's line
            lines = [f.offset(weights, k * isa.channels + column * width, weight) for column in range(columns)]
            loaded = [f.vload_as_float(weight, line) for line in lines]
            for row in range(rows):
                value = f.spread(f.load("float", f.offset(tile, row * width + k)))
                for column in range(columns):
                    place = row * columns + column
                    total[place] = f.vmuladd(value, loaded[column], total[place])
        loop.next(total)
    for value, place in zip(loop.values, places, strict=True):
        f.vstore(value, place, align=4 * width)
