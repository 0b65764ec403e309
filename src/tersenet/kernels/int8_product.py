"""Products of bytes with 32-bit sums, in IR: on AMX's tiles, or by VNNI's instruction on vectors."""

from __future__ import annotations

import itertools

from tersenet.kernels.amx import Tiles
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

CHUNK = 64  # inputs of a line: bytes
QUADS = CHUNK // 4
_ROWS = 16  # of a tile
_UNROLLED = 4  # quads
_FIELDS = ("starts", "taps", "chunks", "v_vector", "m_vector", "line", "plane_phase")
_PARAMETERS = "ptr %context, ptr noalias %v, ptr noalias %u, ptr noalias %initial, ptr noalias %m"
_ARGUMENTS = ("ptr %context", "ptr %v", "ptr %u", "ptr %initial", "ptr %m")


def has_tiles(isa: Isa) -> bool:
    """Whether products are made on AMX's tiles, of signed levels; else levels are stored with 128 added."""
    return "amx-tile" in isa.needs


def group_of(isa: Isa) -> int:
    """Pixels whose sums are kept in registers together. Lines of so many are read, whatever is left."""
    return 2 * _ROWS if has_tiles(isa) else isa.rows


def panel_bytes(isa: Isa) -> int:
    """Of the weights of one chunk of inputs and one block of outputs."""
    return isa.channels * CHUNK


class ByteTiles(Tiles):
    """Tiles of bytes."""

    def multiply(self, total: int, a: int, b: int) -> None:
        self._call("tdpbssd", "i8, i8, i8", f"i8 {total}, i8 {a}, i8 {b}")


def product_kernels(module: Module, isa: Isa) -> None:
    """`products`: the sums of up to `group_of(isa)` pixels by a block of output channels, to M[vector][pixel][lanes].

    `%v` has the lines of the pixels. A tap reads others: `starts` has its phase of the plane, rows and columns.
    """
    f = module.function("products", f"{_PARAMETERS}, i64 %count, i64 %columns", inline=True)
    cases: dict[int, tuple[int, int]] = {}
    for rows, columns in itertools.product((1, 2) if has_tiles(isa) else (1,), range(1, isa.columns + 1)):
        cases[rows * isa.columns + columns] = rows, columns
        (_on_tiles if has_tiles(isa) else _on_vectors)(module, isa, rows, columns)
    rows = f.divmod(f.add("%count", _ROWS - 1), _ROWS)[0] if has_tiles(isa) else "1"
    f.switch(
        f.add(f.mul(rows, isa.columns), "%columns"),
        {case: lambda made=made: f.call(_name(*made), *_ARGUMENTS) for case, made in cases.items()},
    )


def _name(rows: int, columns: int) -> str:
    return f"product_{rows}_{columns}"


def _on_tiles(module: Module, isa: Isa, rows: int, columns: int) -> None:
    f = module.function(_name(rows, columns), _PARAMETERS)
    c = ContextReader(f, *_FIELDS)
    sums = list(itertools.product(range(rows), range(columns)))
    tiles = ByteTiles(f)
    for row, column in sums:
        tiles.zero(row * columns + column)
    with f.loop(c["taps"]) as tap:
        line, weights = _places(f, c, isa, tap.index)
        with f.loop(c["chunks"]) as chunk:
            a = f.offset(line, f.mul(chunk.index, c["v_vector"]), "i8")
            b = f.offset(weights, f.mul(chunk.index, panel_bytes(isa)), "i8")
            for row, column in sums:
                if row == 0:
                    tiles.load(6 + column, f.offset(b, column * _ROWS * CHUNK, "i8"))
                if column == 0:
                    tiles.load(4 + row, f.offset(a, row * _ROWS * CHUNK, "i8"))
                tiles.multiply(row * columns + column, 4 + row, 6 + column)
    for row, column in sums:
        place = f.add(f.mul(c["m_vector"], column), row * _ROWS * isa.width)
        tiles.store(row * columns + column, f.offset("%m", place))


def _on_vectors(module: Module, isa: Isa, _: int, columns: int) -> None:
    f = module.function(_name(1, columns), _PARAMETERS)
    c = ContextReader(f, *_FIELDS)
    width = isa.width
    words, line_bytes = f"<{width} x i32>", 4 * width
    name = f"@llvm.x86.avx512.vpdpbusd.{32 * width}"
    module.declarations.add(f"declare {words} {name}({words}, {words}, {words})")
    first = [f.load(words, f.offset("%initial", k * width), line_bytes) for k in range(columns)]
    carry = [(words, value) for _ in range(isa.rows) for value in first]
    with f.loop(c["taps"], carry=carry) as tap:
        line, weights = _places(f, c, isa, tap.index)
        with f.loop(c["chunks"], carry=[(words, value) for value in tap.values]) as chunk:
            a = f.offset(line, f.mul(chunk.index, c["v_vector"]), "i8")
            b = f.offset(weights, f.mul(chunk.index, panel_bytes(isa)), "i8")
            with f.loop(QUADS, step=_UNROLLED, carry=[(words, value) for value in chunk.values]) as quad:
                sums = list(quad.values)
                for k in range(_UNROLLED):
                    here = f.add(quad.index, k)
                    x = f.offset(a, f.mul(here, 4), "i8")
                    u = f.offset(b, f.mul(here, line_bytes), "i8")
                    loaded = [
                        f.load(words, f.offset(u, column * QUADS * line_bytes, "i8"), line_bytes)
                        for column in range(columns)
                    ]
                    for row in range(isa.rows):
                        four = f.spread(f.load("i32", f.offset(x, row * CHUNK, "i8"), 4), "i32")
                        for column, value in enumerate(loaded):
                            place = row * columns + column
                            sums[place] = f.op(
                                f"call {words} {name}({words} {sums[place]}, {words} {four}, {words} {value})"
                            )
                quad.next(sums)
            chunk.next(quad.values)
        tap.next(chunk.values)
    for row, column in itertools.product(range(isa.rows), range(columns)):
        place = f.add(f.mul(c["m_vector"], column), row * width)
        f.store(words, tap.values[row * columns + column], f.offset("%m", place), line_bytes)


def _places(f: Function, c: ContextReader, isa: Isa, tap: str) -> tuple[str, str]:
    """Where the lines of a tap and its weights begin."""
    entry = f.offset(c["starts"], f.mul(tap, 3), "i64")
    phase, row, column = (f.load("i64", f.offset(entry, k, "i64"), 8) for k in range(3))
    start = f.add(f.mul(phase, c["plane_phase"]), f.mul(f.add(f.mul(row, c["line"]), column), CHUNK))
    panel = f.mul(c["chunks"], panel_bytes(isa))
    return f.offset("%v", start, "i8"), f.offset("%u", f.mul(tap, panel), "i8")
