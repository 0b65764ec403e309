"""Pixels split into their bfloat16 parts, where AMX's tiles read them, in IR."""

from __future__ import annotations

from tersenet.kernels.context import ContextReader
from tersenet.kernels.ir import Function, Module

_WIDTH = 16
_VECTOR = "<16 x float>"
_PARTS = "<32 x bfloat>"
HALF = "<16 x bfloat>"
_SPLIT = "@llvm.x86.avx512bf16.cvtne2ps2bf16.512"


def copy_function(module: Module) -> None:
    """`copy`: V of `%count` pixels of `%image`, from `%pixel` on: positions of the kernel of `copy_high` by `copy_wide`
    pixels, in lines of `line`. Each row of that kernel is a segment, whose pixels lie side by side in the image; or
    the kernel is one pixel, and each of its `groups` of `channels` is a segment. What is outside the image, and what
    fills up a segment's last chunk, is zero."""
    module.declarations.add(f"declare {_PARTS} {_SPLIT}({_VECTOR}, {_VECTOR})")
    f = module.function("copy", "ptr %context, ptr noalias %v, i64 %image, i64 %pixel, i64 %count")
    c = ContextReader(
        f, "x", "x_image", "x_row", "x_column", "channels", "height", "width", "pad_top", "pad_left",
        "copy_high", "copy_wide", "step_high", "step_wide", "line", "groups", "slices", "v_vector", "v_low",
    )  # fmt: skip
    floats = f.mul(c["copy_wide"], c["channels"])
    image = f.offset(c["x"], f.mul("%image", c["x_image"]))
    is_even = f.compare("eq", f.divmod(floats, 2 * _WIDTH)[1], 0)
    line, column = f.divmod("%pixel", c["line"])
    with f.loop("%count", carry=[("i64", line), ("i64", column)]) as pixel:
        line, column = pixel.values
        left = f.sub(f.mul(column, c["step_wide"]), c["pad_left"])
        top = f.sub(f.mul(line, c["step_high"]), c["pad_top"])
        x = f.offset(image, f.mul(left, c["x_column"]))
        own = f.offset("%v", f.mul(pixel.index, _WIDTH))
        # The floats of a segment that are in the image, in a row that is.
        begin = f.mul(f.maximum(f.sub("0", left), 0), c["channels"])
        end = f.mul(f.minimum(c["copy_wide"], f.sub(c["width"], left)), c["channels"])
        is_wide = f.both(is_even, f.both(f.compare("eq", begin, 0), f.compare("eq", end, floats)))
        with f.loop(c["copy_high"]) as row, f.loop(c["groups"]) as group:
            y = f.add(top, row.index)
            source = f.offset(x, f.add(f.mul(y, c["x_row"]), f.mul(group.index, c["channels"])))
            segment = f.mul(f.add(row.index, group.index), c["slices"])  # one of them counts
            target = f.offset(own, f.mul(segment, c["v_vector"]))
            is_high = f.compare("ult", y, c["height"])  # unsigned: what is negative is not inside either
            is_whole = f.both(is_high, is_wide)
            with f.when(is_whole), f.loop(c["slices"]) as chunk:
                place = f.offset(source, f.mul(chunk.index, 2 * _WIDTH))
                goal = f.offset(target, f.mul(chunk.index, c["v_vector"]))
                _split(f, c, f.vload(place), f.vload(f.offset(place, _WIDTH)), goal)
            last = f.op(f"select i1 {is_high}, i64 {end}, i64 0")
            with f.when(f.op(f"xor i1 {is_whole}, true")), f.loop(c["slices"]) as chunk:
                place = f.mul(chunk.index, 2 * _WIDTH)
                goal = f.offset(target, f.mul(chunk.index, c["v_vector"]))
                first, second = (
                    f.vload(f.offset(source, start), _between(f, f.sub(begin, start), f.sub(last, start)))
                    for start in (place, f.add(place, _WIDTH))
                )
                _split(f, c, first, second, goal)
        pixel.next(f.following(line, column, c["line"]))


def _split(f: Function, c: ContextReader, first: str, second: str, goal: str) -> None:
    """Write the parts of two vectors."""
    high = f.op(f"call {_PARTS} {_SPLIT}({_VECTOR} {second}, {_VECTOR} {first})")
    f.store(_PARTS, high, goal, 64)
    rest = [f.vsub(value, _half(f, high, part)) for part, value in enumerate((first, second))]
    low = f.op(f"call {_PARTS} {_SPLIT}({_VECTOR} {rest[1]}, {_VECTOR} {rest[0]})")
    f.store(_PARTS, low, f.offset(goal, c["v_low"]), 64)


def _between(f: Function, begin: str, end: str) -> str:
    """The mask of the lanes from `begin` to `end`, which may be outside."""
    kind = f"<{_WIDTH} x i1>"
    before = f.lanes(f.maximum(f.minimum(begin, _WIDTH), 0))
    until = f.lanes(f.maximum(f.minimum(end, _WIDTH), 0))
    return f.op(f"select {kind} {before}, {kind} zeroinitializer, {kind} {until}")


def _half(f: Function, parts: str, half: int) -> str:
    """Sixteen of the 32 parts as floats."""
    bits = f.op(f"bitcast {_PARTS} {parts} to <32 x i16>")
    lanes = ", ".join(f"i32 {half * _WIDTH + lane}" for lane in range(_WIDTH))
    mine = f.op(f"shufflevector <32 x i16> {bits}, <32 x i16> poison, <{_WIDTH} x i32> <{lanes}>")
    return _floats(f, mine)


def halves(f: Function, value: str) -> tuple[str, str]:
    """The high and the low part of a vector of 16 floats, as `HALF`."""
    name = "@llvm.x86.avx512bf16.cvtneps2bf16.512"
    f.module.declarations.add(f"declare {HALF} {name}({_VECTOR})")
    high = f.op(f"call {HALF} {name}({_VECTOR} {value})")
    rest = f.vsub(value, _floats(f, f.op(f"bitcast {HALF} {high} to <16 x i16>")))
    return high, f.op(f"call {HALF} {name}({_VECTOR} {rest})")


def _floats(f: Function, bits: str) -> str:
    """Sixteen bfloat16 numbers as floats: their bits come first."""
    wide = f.op(f"zext <{_WIDTH} x i16> {bits} to <{_WIDTH} x i32>")
    shifts = ", ".join(["i32 16"] * _WIDTH)
    moved = f.op(f"shl <{_WIDTH} x i32> {wide}, <{shifts}>")
    return f.op(f"bitcast <{_WIDTH} x i32> {moved} to {_VECTOR}")
