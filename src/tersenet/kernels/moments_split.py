"""Fixed-point digits of rows, for products on AMX's matrix tiles: the first half of `moments`, in IR."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tersenet.kernels.blocks import TASK
from tersenet.kernels.ir import Function, Module

STEP = 64  # rows that one tile of products takes
PANEL = 32  # columns whose products with 32 others are kept in tiles together
DIGITS = 3
BASE, TOP = 254, 127
LANES = 16
TILE = 1024  # bytes
FLOATS, DOUBLES, WORDS = (f"<{LANES} x {kind}>" for kind in ("float", "double", "i32"))
_LEAST = 1e-30  # smaller deviations have products that float32 hasn't

FIELDS: Sequence[str] = (
    "rows stride left right units offsets distances means sums width panels steps "
    "count reciprocal share weight root next"
).split()


class Fields:
    """Those of the context that a function gets as `%context`, read where it begins."""

    def __init__(self, f: Function, *names: str) -> None:
        pointers = ("rows", "left", "right", "units", "offsets", "distances", "means", "sums")
        self._f = f
        self._read = {name: f.load("ptr" if name in pointers else "i64", self.address(name), 8) for name in names}

    def __getitem__(self, name: str) -> str:
        return self._read[name]

    def number(self, name: str) -> str:
        """A field that holds the bits of a double."""
        return self._f.op(f"bitcast i64 {self[name]} to double")

    def address(self, name: str) -> str:
        return self._f.offset("%context", FIELDS.index(name), "i64")


def call(f: Function, kind: str, name: str, *values: str) -> str:
    """A function of LLVM's own, whose arguments are of its result's type."""
    f.module.declarations.add(f"declare {kind} @llvm.{name}({', '.join([kind] * len(values))})")
    return f.op(f"call {kind} @llvm.{name}({', '.join(f'{kind} {value}' for value in values)})")


def wide(f: Function, value: str) -> str:
    return f.op(f"fpext {FLOATS} {value} to {DOUBLES}")


def arithmetic(f: Function, name: str, a: str, b: str) -> str:
    return f.op(f"{name} {DOUBLES} {a}, {b}")


def muladd(f: Function, a: str, b: str, c: str) -> str:
    return call(f, DOUBLES, f"fmuladd.v{LANES}f64", a, b, c)


def every(value: float) -> str:
    """A constant vector of doubles, which must be exact in decimals."""
    return "<" + ", ".join([f"double {value!r}"] * LANES) + ">"


def split_functions(module: Module) -> None:
    """The task `run_split` and what it calls."""
    _transpose(module)
    _split(module)
    _run_split(module)


def _transpose(module: Module) -> None:
    """A tile of `right` as one of `left`: its 16 x 16 words transposed."""
    f = module.function("transpose", "ptr noalias %from, ptr noalias %to")
    lines = [f.load(WORDS, f.offset("%from", TILE // 16 * k, "i8"), 64) for k in range(LANES)]
    for apart in (8, 4, 2, 1):
        for k in (k for k in range(LANES) if not k & apart):
            a, b = lines[k], lines[k + apart]
            first = [lane if not lane & apart else LANES + lane - apart for lane in range(LANES)]
            second = [lane + apart if not lane & apart else LANES + lane for lane in range(LANES)]
            lines[k], lines[k + apart] = (_shuffled(f, a, b, order) for order in (first, second))
    for k, line in enumerate(lines):
        f.store(WORDS, line, f.offset("%to", TILE // 16 * k, "i8"), 64)


def _shuffled(f: Function, a: str, b: str, order: list[int]) -> str:
    mask = ", ".join(f"i32 {lane}" for lane in order)
    return f.op(f"shufflevector {WORDS} {a}, {WORDS} {b}, {WORDS} <{mask}>")


def _split(module: Module) -> None:
    """Means, scale and digits of the panel `%panel`."""
    f = module.function("split", "ptr %context, i64 %panel")
    c = Fields(
        f, "rows", "stride", "left", "right", "units", "offsets", "distances", "means", "steps", "count",
        "reciprocal", "share", "weight", "root",
    )  # fmt: skip
    begin = f.mul("%panel", PANEL)
    x = f.offset(c["rows"], begin)
    halves = range(PANEL // LANES)
    zero = [(FLOATS, f.splat(0))]
    reciprocal = f.spread(f.op(f"fptrunc double {c.number('reciprocal')} to float"))
    with f.loop(c["count"], carry=zero * len(halves)) as row:
        line = f.offset(x, f.mul(row.index, c["stride"]))
        row.next([f.vadd(row.values[h], f.vload(f.offset(line, h * LANES))) for h in halves])
    mean = [f.vmul(value, reciprocal) for value in row.values]
    # Once more: what rounding has left of a mean far from zero.
    with f.loop(c["count"], carry=zero * 2 * len(halves)) as row:
        line = f.offset(x, f.mul(row.index, c["stride"]))
        away = [f.vsub(f.vload(f.offset(line, h * LANES)), mean[h]) for h in halves]
        tops = [_larger(f, row.values[len(halves) + h], _size(f, away[h])) for h in halves]
        row.next([*(f.vadd(row.values[h], away[h]) for h in halves), *tops])
    rest = [f.vmul(row.values[h], reciprocal) for h in halves]
    # Of a mean far larger than all deviations, rounding what is taken off moves them by up to some last places of it.
    largest = [
        f.vmuladd(_size(f, mean[h]), f.splat(2**-22), f.vadd(row.values[len(halves) + h], _size(f, rest[h])))
        for h in halves
    ]
    shifts = [_described(f, c, f.add(begin, h * LANES), mean[h], rest[h], largest[h]) for h in halves]
    size = f.mul(c["steps"], DIGITS * len(halves) * TILE)
    right, left = (f.offset(c[side], f.mul("%panel", size), "i8") for side in ("right", "left"))
    digit = f.mul(c["steps"], len(halves) * TILE)
    with f.loop(c["steps"]) as step:
        place = f.mul(step.index, len(halves) * TILE)
        with f.loop(LANES) as quad:
            first = f.add(f.mul(step.index, STEP), f.mul(quad.index, 4))
            for side in (right, left):
                for number in range(DIGITS):
                    after = f.add(
                        f.mul(digit, number), f.add(place, f.add(f.mul(quad.index, 2 * TILE // 16), 2 * TILE))
                    )
                    for k in range(2):
                        f.prefetch(f.offset(side, f.add(after, 64 * k), "i8"), write=True)
            to = f.offset(right, f.add(place, f.mul(quad.index, TILE // 16)), "i8")
            for h in halves:
                _quad(
                    f,
                    c,
                    f.offset(x, h * LANES),
                    first,
                    shifts[h],
                    f.offset(to, h * TILE, "i8"),
                    digit,
                )
        for number, h in itertools.product(range(DIGITS), halves):
            tile = f.add(f.add(f.mul(digit, number), place), h * TILE)
            f.call("transpose", f"ptr {f.offset(right, tile, 'i8')}", f"ptr {f.offset(left, tile, 'i8')}")


def _size(f: Function, value: str) -> str:
    return call(f, FLOATS, f"fabs.v{LANES}f32", value)


def _larger(f: Function, a: str, b: str) -> str:
    """The larger of two vectors of numbers."""
    above = f.op(f"fcmp ogt {FLOATS} {a}, {b}")
    return f.op(f"select <{LANES} x i1> {above}, {FLOATS} {a}, {FLOATS} {b}")


def _described(f: Function, c: Fields, column: str, mean: str, rest: str, largest: str) -> tuple[str, str]:
    """Write what the context has of 16 columns; return what is taken off them, and what they are multiplied with to be
    in units of the first digit.

    A zero becomes a whole number of them: behind a ReLU most values are zeros, and what is left out of products of
    their other digits would not average out.
    """
    share, weight, root = (f.spread(c.number(name), "double") for name in ("share", "weight", "root"))
    seen = f.op(f"fcmp ogt {FLOATS} {largest}, {f.splat(_LEAST)}")
    scale = f.op(f"fdiv {FLOATS} {f.splat(TOP - 1)}, {largest}")
    scale = f.op(f"select <{LANES} x i1> {seen}, {FLOATS} {scale}, {FLOATS} zeroinitializer")
    unit = arithmetic(f, "fdiv", every(1.0), wide(f, scale))
    whole = call(f, FLOATS, f"rint.v{LANES}f32", f.vmul(f.vadd(mean, rest), scale))
    shift = f.op(f"fptrunc {DOUBLES} {arithmetic(f, 'fmul', wide(f, whole), unit)} to {FLOATS}")
    so_far = f.load(DOUBLES, f.offset(c["means"], column, "double"), 64)
    own = arithmetic(f, "fadd", wide(f, mean), wide(f, rest))
    apart = arithmetic(f, "fsub", own, so_far)
    offset = arithmetic(f, "fsub", own, wide(f, shift))
    unit, offset = (
        f.op(f"select <{LANES} x i1> {seen}, {DOUBLES} {value}, {DOUBLES} zeroinitializer")
        for value in (arithmetic(f, "fdiv", unit, every(float(BASE))), arithmetic(f, "fmul", offset, root))
    )
    distance, moved = arithmetic(f, "fmul", apart, weight), muladd(f, apart, share, so_far)
    for name, value in (("units", unit), ("offsets", offset), ("distances", distance), ("means", moved)):
        f.store(DOUBLES, value, f.offset(c[name], column, "double"), 64)
    return f.op(f"select <{LANES} x i1> {seen}, {FLOATS} {shift}, {FLOATS} {mean}"), scale


def _quad(f: Function, c: Fields, x: str, first: str, column: tuple[str, str], to: str, digit: str) -> None:
    """The digits of four rows and 16 columns, a word for each column. Rows behind the last are zero."""
    shift, scale = column
    words = [f"{WORDS} zeroinitializer"] * DIGITS
    for k in range(4):
        row = f.add(first, k)
        value = f.vload(f.offset(x, f.mul(row, c["stride"])))
        there = f.op(f"select i1 {f.compare('slt', row, c['count'])}, {FLOATS} {scale}, {FLOATS} zeroinitializer")
        value = f.vmul(f.vsub(value, shift), there)
        for number in range(DIGITS):
            whole = call(f, FLOATS, f"rint.v{LANES}f32", value)
            byte = f.op(f"fptosi {FLOATS} {whole} to {WORDS}")
            if k < 3:
                byte = f.op(f"and {WORDS} {byte}, {_numbers(255)}")
            byte = f.op(f"shl {WORDS} {byte}, {_numbers(8 * k)}")
            words[number] = f"{WORDS} {f.op(f'or {words[number]}, {byte}')}"
            if number + 1 < DIGITS:
                value = f.vmul(f.vsub(value, whole), f.splat(BASE))
    for number, word in enumerate(words):
        f.line(f"store {word}, ptr {f.offset(to, f.mul(digit, number), 'i8')}, align 64")


def _numbers(value: int) -> str:
    return "<" + ", ".join([f"i32 {value}"] * LANES) + ">"


def _run_split(module: Module) -> None:
    f = module.function("run_split", TASK, exported=True)
    c = Fields(f, "panels")
    with f.claims(c.address("next"), c["panels"]) as panel:
        f.call("split", "ptr %context", f"i64 {panel}")
