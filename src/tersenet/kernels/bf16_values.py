"""bfloat16 numbers in LLVM IR: read, rounded and written, beside floats."""

from __future__ import annotations

from tersenet.kernels.ir import Function

WIDTH = 16
PAIR = 2 * WIDTH
"""bfloat16 numbers in a cache line."""
BITS = "i16"
"""How they are addressed: LLVM counts in elements of a type."""
_FLOATS = f"<{WIDTH} x float>"
_LINE = f"<{PAIR} x i16>"
_HALVES = f"<{WIDTH} x i16>"


def line_of(f: Function, half: bool, pointer: str, count: str | None = None) -> str:
    """32 numbers from memory as bfloat16, of which the first `count` exist; the others are zero, and are not read.
    `half`: they are bfloat16 there; else floats, which are rounded."""
    if half:
        if count is None:
            return f.load(_LINE, pointer, 2)
        name = "@llvm.masked.load.v32i16.p0"
        f.module.declarations.add(f"declare {_LINE} {name}(ptr, i32 immarg, <{PAIR} x i1>, {_LINE})")
        return f.op(
            f"call {_LINE} {name}(ptr {pointer}, i32 2, <{PAIR} x i1> {_lanes(f, count)}, {_LINE} zeroinitializer)"
        )
    second = f.offset(pointer, WIDTH)
    if count is None:
        return line(f, f.vload(pointer), f.vload(second))
    return line(f, f.vload(pointer, f.lanes(count)), f.vload(second, f.lanes(f.sub(count, WIDTH))))


def line(f: Function, first: str, second: str) -> str:
    """Two vectors of floats, rounded."""
    name, made = "@llvm.x86.avx512bf16.cvtne2ps2bf16.512", f"<{PAIR} x bfloat>"
    f.module.declarations.add(f"declare {made} {name}({_FLOATS}, {_FLOATS})")
    return f.op(f"bitcast {made} {f.op(f'call {made} {name}({_FLOATS} {second}, {_FLOATS} {first})')} to {_LINE}")


def store_line(f: Function, value: str, pointer: str, count: str | None = None, align: int = 2) -> None:
    """32 numbers to memory, or the first `count` of them."""
    if count is None:
        f.store(_LINE, value, pointer, align)
        return
    name = "@llvm.masked.store.v32i16.p0"
    f.module.declarations.add(f"declare void {name}({_LINE}, ptr, i32 immarg, <{PAIR} x i1>)")
    f.line(f"call void {name}({_LINE} {value}, ptr {pointer}, i32 {align}, <{PAIR} x i1> {_lanes(f, count)})")


def load_floats(f: Function, half: bool, pointer: str, mask: str | None = None) -> str:
    """16 numbers from memory as floats; lanes outside `mask` are zero."""
    if not half:
        return f.vload(pointer, mask)
    if mask is None:
        return widened(f, f.load(_HALVES, pointer, 2))
    name = "@llvm.masked.load.v16i16.p0"
    f.module.declarations.add(f"declare {_HALVES} {name}(ptr, i32 immarg, <{WIDTH} x i1>, {_HALVES})")
    return widened(
        f, f.op(f"call {_HALVES} {name}(ptr {pointer}, i32 2, <{WIDTH} x i1> {mask}, {_HALVES} zeroinitializer)")
    )


def store_floats(f: Function, half: bool, value: str, pointer: str, mask: str | None = None) -> None:
    """16 floats to memory, with `half` rounded."""
    if not half:
        f.vstore(value, pointer, mask)
        return
    name, made = "@llvm.x86.avx512bf16.cvtneps2bf16.512", f"<{WIDTH} x bfloat>"
    f.module.declarations.add(f"declare {made} {name}({_FLOATS})")
    bits = f.op(f"bitcast {made} {f.op(f'call {made} {name}({_FLOATS} {value})')} to {_HALVES}")
    if mask is None:
        f.store(_HALVES, bits, pointer, 2)
        return
    name = "@llvm.masked.store.v16i16.p0"
    f.module.declarations.add(f"declare void {name}({_HALVES}, ptr, i32 immarg, <{WIDTH} x i1>)")
    f.line(f"call void {name}({_HALVES} {bits}, ptr {pointer}, i32 2, <{WIDTH} x i1> {mask})")


def widened(f: Function, bits: str) -> str:
    """16 bfloat16 numbers as floats: their bits come first."""
    wide = f.op(f"zext {_HALVES} {bits} to <{WIDTH} x i32>")
    shifts = ", ".join(["i32 16"] * WIDTH)
    moved = f.op(f"shl <{WIDTH} x i32> {wide}, <{shifts}>")
    return f.op(f"bitcast <{WIDTH} x i32> {moved} to {_FLOATS}")


def _lanes(f: Function, count: str) -> str:
    """The mask of the first `count` of 32 lanes; `count` may be more."""
    numbers = ", ".join(f"i16 {lane}" for lane in range(PAIR))
    short = f.op(f"trunc i64 {f.minimum(count, PAIR)} to i16")
    one = f.op(f"insertelement {_LINE} poison, i16 {short}, i64 0")
    spread = f.op(f"shufflevector {_LINE} {one}, {_LINE} poison, <{PAIR} x i32> zeroinitializer")
    return f.op(f"icmp slt {_LINE} <{numbers}>, {spread}")
