"""The product of a weight pruned without a pattern, in IR: M = U V for one tap, with tiles in the lanes.

Where single weights are left, no vector of output channels is empty; so a weight is one number here, and meets a vector
of tiles. The tiles of `width` make a group, and up to `GROUPS` of them share the lists. Layouts:

* V[tap][input channel][width] and M[tap][output channel][width] of each group: squares of width x width are transposed
  behind the input transform, which makes channels lie in the lanes, and again before the output transform.
* U[entry]: the weights that are left, by tap, slice of input channels and output channel.
* the list[entry]: where in V the input channel is, in floats, a 32-bit integer; starts[row]: the row's first entry.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

GROUPS = 4
SLICE = 256
"""Input channels whose V stays near while the output channels pass by; fewer make short rows, and each has a start."""
# With few tiles the sums of several entries run beside each other: an addition has to wait for the one before.
_CHAINS = {1: 4, 2: 2, 3: 2, 4: 1}
_LINE = 16  # entries that one prefetch brings
_AHEAD = 512  # entries; the lists are read once and in order, and come from afar
_PARAMETERS = (
    "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %list, ptr noalias %starts, ptr noalias %m, "
    "i64 %rows, i64 %slice"
)


def scattered_kernels(module: Module, isa: Isa) -> None:
    """`scattered`: dispatches to a kernel for 1 ... `GROUPS` groups; and `transpose`, of a square in its place.

    `%starts` is that of the first of `%rows` output channels. With slice 0 M is set, else added to.
    """
    _transpose(module, isa)
    for groups in range(1, GROUPS + 1):
        _kernel(module, isa, groups)
    f = module.function("scattered", f"{_PARAMETERS}, i64 %groups", inline=True)
    typed = _PARAMETERS.replace("noalias ", "").split(", ")

    def case(groups: int) -> Callable[[], None]:
        return lambda: f.call(f"scattered_{groups}", *typed)

    f.switch("%groups", {groups: case(groups) for groups in range(1, GROUPS + 1)})


def _kernel(module: Module, isa: Isa, groups: int) -> None:
    f = module.function(f"scattered_{groups}", _PARAMETERS)
    c = ContextReader(f, "v_block", "m_block")
    v, aligned = module.vector, 4 * isa.width
    tiles = [f.offset("%v", f.mul(c["v_block"], group)) for group in range(groups)]
    sums = [f.offset("%m", f.mul(c["m_block"], group)) for group in range(groups)]
    is_first = f.compare("eq", "%slice", 0)
    chains = _CHAINS[groups]
    with f.loop("%rows", carry=[("i64", f.load("i64", "%starts", 8))]) as row:
        (first,) = row.values
        last = f.load("i64", f.offset("%starts", f.add(row.index, 1), "i64"), 8)
        with f.loop(last, start=first, step=_LINE) as line:
            for table, kind in (("%u", "float"), ("%list", "i32")):
                f.prefetch(f.offset(table, f.add(line.index, _AHEAD), kind))
        places = [f.offset(place, f.mul(row.index, isa.width)) for place in sums]
        loaded = partial(_loaded, f, places, aligned)
        total = f.choose(is_first, v, lambda: ["zeroinitializer"] * groups, loaded)
        even = first
        if chains > 1:
            even = f.sub(last, f.divmod(f.sub(last, first), chains)[1])
            zeros = ["zeroinitializer"] * (groups * (chains - 1))
            with f.loop(even, start=first, step=chains, carry=[(v, value) for value in [*total, *zeros]]) as loop:
                following: list[str] = []
                for chain in range(chains):
                    own = loop.values[chain * groups : (chain + 1) * groups]
                    following += _entry(f, f.add(loop.index, chain), tiles, own, aligned)
                loop.next(following)
            total = loop.values
            while len(total) > groups:
                half = len(total) // 2
                total = [f.vadd(a, b) for a, b in zip(total[:half], total[half:], strict=True)]
        with f.loop(last, start=even, carry=[(v, value) for value in total]) as rest:
            rest.next(_entry(f, rest.index, tiles, rest.values, aligned))
        for value, place in zip(rest.values, places, strict=True):
            f.vstore(value, place, align=aligned)
        row.next([last])


def _loaded(f: Function, places: list[str], aligned: int) -> list[str]:
    return [f.vload(place, align=aligned) for place in places]


def _entry(f: Function, index: str, tiles: list[str], sums: list[str], aligned: int) -> list[str]:
    """The sums with one more weight in them."""
    channel = f.op(f"zext i32 {f.load('i32', f.offset('%list', index, 'i32'))} to i64")
    weight = f.spread(f.load("float", f.offset("%u", index)))
    return [
        f.vmuladd(weight, f.vload(f.offset(tile, channel), align=aligned), value)
        for tile, value in zip(tiles, sums, strict=True)
    ]


def _transpose(module: Module, isa: Isa) -> None:
    """Halves change places, then halves of these, and so on: width log2(width) shuffles."""
    width, v = isa.width, module.vector
    f = module.function("transpose", "ptr noalias %square")
    places = [f.offset("%square", row * width) for row in range(width)]
    rows = [f.vload(place, align=4 * width) for place in places]
    distance = width // 2
    while distance:
        low = [lane if not lane & distance else width + lane - distance for lane in range(width)]
        high = [lane + distance if not lane & distance else width + lane for lane in range(width)]
        for i in range(width):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                for place, lanes in ((i, low), (i + distance, high)):
                    picked = ", ".join(f"i32 {lane}" for lane in lanes)
                    rows[place] = f.op(f"shufflevector {v} {a}, {v} {b}, <{width} x i32> <{picked}>")
        distance //= 2
    for value, place in zip(rows, places, strict=True):
        f.vstore(value, place, align=4 * width)
