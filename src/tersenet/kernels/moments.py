"""Second moments of rows by AMX's matrix tiles, in IR: float32 rows in, float64 sums out, products of whole numbers.

Deviations become fixed-point numbers of three digits in base 254, from -127 to 127: 254^2 a + 254 b + c in units of
which the largest deviation of a column and a block has 126 * 254^2. AMX makes 16 x 16 x 64 products of such digits at
once, 32 times as many as the vector units make in float32. Those below 2^-24 of the largest are left out, b c and c c.
The others, a a, a b + b a and a c + b b + c a, are summed up exactly in 32 bits.

* rows[row][column], panels of 32 columns
* left[panel][digit][step of 64 rows][half of the panel][16 columns][64 rows]
* right[panel][digit][step of 64 rows][half of the panel][16 quads of rows][16 columns][4 rows]
* sums[column][column], of which panels on and below the diagonal are added to

Source: Ootomo, Ozaki, Yokota, DGEMM on Integer Matrix Multiplication Unit, 2024 (products of digits). Results are the
same for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from tersenet.kernels.blocks import TASK
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.moments_split import (
    BASE,
    DIGITS,
    DOUBLES,
    LANES,
    PANEL,
    TILE,
    WORDS,
    Fields,
    arithmetic,
    every,
    muladd,
    split_functions,
)

MOMENT_TASKS = ("run_split", "run_products")
GROUP = 4  # panels that stay in the second-level cache while others pass by
SEGMENT = 20  # panels that pass by in one unit of work
# Parts of a block's rows: a part's digits of both sides stay in the first-level cache for the passes that follow. More
# parts than needed would store and load the sums more often.
_PARTS = 4
# Digits of the right side for each sum of products.
_PASSES = ((0,), (1, 0), (1, 0, 2))


@dataclass(frozen=True)
class MomentKernel:
    """The code for all sizes, which are arguments. `isa` has tiles for bytes."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"moments-{self.isa.name}"


def generate_moments(algorithm: MomentKernel) -> str:
    """The text of its module, with the tasks `run_split` and then `run_products`."""
    module = Module(algorithm.isa.width, '"prefer-vector-width"="512" "min-legal-vector-width"="512"')
    # Palette 1; all eight tiles have 16 rows of 64 bytes.
    layout = [1, 0] + [0] * 14 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
    values = ", ".join(f"i8 {value}" for value in layout)
    module.declarations.add(f"@layout = internal constant [64 x i8] [{values}], align 64")
    split_functions(module)
    _block(module)
    _run_products(module)
    return module.text()


def _tile(f: Function, name: str, *arguments: str) -> None:
    kinds = ", ".join(argument.rsplit(" ", 1)[0].replace("i8", "i8 immarg") for argument in arguments)
    f.module.declarations.add(f"declare void @llvm.x86.{name}({kinds})")
    f.line(f"call void @llvm.x86.{name}({', '.join(arguments)})")


def _block(module: Module) -> None:
    """Products of the panels `%row` and `%column` to the sums; meanwhile a part of the next panel is fetched."""
    f = module.function("block", "ptr %context, i64 %row, i64 %column, ptr %next")
    c = Fields(f, "left", "right", "units", "offsets", "distances", "sums", "width", "steps")
    exact = f.op(f"alloca [{DIGITS * 4 * TILE} x i8], align 64")
    digit = f.mul(c["steps"], 2 * TILE)
    left, right = (
        f.offset(c[side], f.mul(f.mul(place, digit), DIGITS), "i8")
        for side, place in (("left", "%row"), ("right", "%column"))
    )
    first, begin = f.mul("%row", PANEL), f.mul("%column", PANEL)
    sums = f.offset(c["sums"], f.add(f.mul(first, c["width"]), begin), "double")
    fetched = "%next"
    for part in range(_PARTS):
        start, end = (f.divmod(f.mul(c["steps"], k), _PARTS)[0] for k in (part, part + 1))
        for order in range(DIGITS):
            for total in range(4):
                if part:
                    pointer = f.offset(exact, (4 * order + total) * TILE, "i8")
                    _tile(f, "tileloadd64", f"i8 {total}", f"ptr {pointer}", "i64 64")
                else:
                    _tile(f, "tilezero", f"i8 {total}")
            for number in _PASSES[order]:
                a, b = f.offset(left, f.mul(digit, order - number), "i8"), f.offset(right, f.mul(digit, number), "i8")
                with f.loop(end, start=start) as step:
                    lines = f.offset(fetched, f.mul(f.sub(step.index, start), 16 // GROUP * 64), "i8")
                    for k in range(16 // GROUP):
                        f.prefetch(f.offset(lines, 64 * k, "i8"), near=False)
                    if order == 1:
                        line = f.add(f.sub(step.index, start), 8 * part + 4 * number)
                        line = f.offset(sums, f.mul(line, c["width"]), "double")
                        for k in range(PANEL * 8 // 64):
                            f.prefetch(f.offset(line, 8 * k, "double"), write=True)
                    for tile, side, totals in ((4, a, ()), (6, b, (0,)), (7, b, (1,)), (5, a, (2, 3))):
                        place = f.add(f.mul(step.index, 2 * TILE), tile % 2 * TILE)
                        _tile(f, "tileloadd64", f"i8 {tile}", f"ptr {f.offset(side, place, 'i8')}", "i64 64")
                        for total in totals:
                            _tile(f, "tdpbssd", f"i8 {total}", f"i8 {4 + total // 2}", f"i8 {6 + total % 2}")
                fetched = f.offset(fetched, f.mul(f.sub(end, start), 16 // GROUP * 64), "i8")
            for total in range(4):
                pointer = f.offset(exact, (4 * order + total) * TILE, "i8")
                _tile(f, "tilestored64", f"i8 {total}", f"ptr {pointer}", "i64 64")
    columns = [f.add(begin, h * LANES) for h in range(2)]
    names = ("units", "offsets", "distances")
    across = {name: [f.load(DOUBLES, f.offset(c[name], k, "double"), 64) for k in columns] for name in names}
    with f.loop(PANEL) as line:
        half, inside = f.divmod(line.index, LANES)
        row = f.add(first, line.index)
        own = {name: f.spread(f.load("double", f.offset(c[name], row, "double"), 8), "double") for name in names}
        own["offsets"] = f.op(f"fneg {DOUBLES} {own['offsets']}")
        for h in range(2):
            place = f.add(f.mul(f.add(f.mul(half, 2), h), TILE), f.mul(inside, 64))
            value = ""
            for order in range(DIGITS):
                pointer = f.offset(exact, f.add(place, 4 * order * TILE), "i8")
                number = f.op(f"sitofp {WORDS} {f.load(WORDS, pointer, 64)} to {DOUBLES}")
                value = number if not order else muladd(f, value, every(float(BASE)), number)
            to = f.offset(sums, f.add(f.mul(line.index, c["width"]), h * LANES), "double")
            total = f.load(DOUBLES, to, 64)
            total = muladd(f, arithmetic(f, "fmul", value, own["units"]), across["units"][h], total)
            for name in ("offsets", "distances"):
                total = muladd(f, own[name], across[name][h], total)
            f.store(DOUBLES, total, to, 64)


def _run_products(module: Module) -> None:
    """Units are groups of panels, the longest first, times segments of the panels up to theirs."""
    f = module.function("run_products", TASK, exported=True)
    c = Fields(f, "right", "panels", "steps")
    groups, segments = (f.divmod(f.add(c["panels"], each - 1), each)[0] for each in (GROUP, SEGMENT))
    size = f.mul(c["steps"], DIGITS * 2 * TILE)
    part = f.divmod(size, GROUP)[0]
    last = f.sub(c["panels"], 1)
    _tile(f, "ldtilecfg", "ptr @layout")
    with f.claims(c.address("next"), f.mul(groups, segments)) as unit:
        behind, segment = f.divmod(unit, segments)
        group = f.mul(f.sub(f.sub(groups, 1), behind), GROUP)
        end = f.minimum(f.add(group, GROUP), c["panels"])
        begin = f.mul(segment, SEGMENT)
        with f.loop(f.minimum(f.add(begin, SEGMENT), end), start=begin) as column:
            following = f.offset(c["right"], f.mul(f.minimum(f.add(column.index, 1), last), size), "i8")
            with f.loop(end, start=f.maximum(group, column.index)) as row:
                fetched = f.offset(following, f.mul(f.sub(row.index, group), part), "i8")
                f.call("block", "ptr %context", f"i64 {row.index}", f"i64 {column.index}", f"ptr {fetched}")
    f.line("call void @llvm.x86.tilerelease()")
    module.declarations.add("declare void @llvm.x86.tilerelease()")
