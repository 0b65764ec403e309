"""Levels of float32 numbers, in IR, and the task that writes those of a padded image."""

from __future__ import annotations

from collections.abc import Callable

from tersenet.kernels.blocks import TASK
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.int8_product import CHUNK, has_tiles
from tersenet.kernels.ir import Function, Module

ROUNDER = 1.5 * 2**23
"""A number below 2^22 that it is added to is rounded, ties to even; the low bits are the whole number. Numbers beyond
keep their order."""


def quantize_function(module: Module, isa: Isa, signed: bool, taken: bool) -> None:
    """`run_quantize`: the levels of the image, and of the zeros around it, in planes (see `int8`). With `taken` the
    image is levels already, of channels that fill up vectors."""
    f = module.function("run_quantize", TASK, exported=True)
    c = ContextReader(
        f, "x", "x_image", "x_row", "x_column", "height", "width", "channels", "pad_top", "pad_left", "step_high",
        "step_wide", "copy_high", "copy_wide", "line", "plane_rows", "plane_chunk", "plane_phase", "plane_image",
        "units", "shared", *fields_of("x"),
    )  # fmt: skip
    width, bytes_of, kind = isa.width, f"<{isa.width} x i8>", "i8" if taken else "float"
    offset = offset_of(isa, signed)
    level = leveller(f, c, "x", offset)

    def copied(pointer: str, to: str, bytes_at_once: int) -> None:
        vector = f"<{bytes_at_once} x i8>"
        value = f.load(vector, pointer, 1)
        if offset:
            value = f.op(f"xor {vector} {value}, {_constant(bytes_at_once, offset)}")
        f.store(vector, value, to, bytes_at_once)

    whole, left_over = f.divmod(c["channels"], CHUNK)
    zero = _constant(width, offset)
    with f.claims(c.address("next_input"), c["units"]) as unit:
        rest, row = f.divmod(unit, c["plane_rows"])
        rest, wide = f.divmod(rest, c["copy_wide"])
        image, high = f.divmod(rest, c["copy_high"])
        y = f.sub(f.add(f.mul(row, c["step_high"]), high), c["pad_top"])
        phase = f.add(f.mul(high, c["copy_wide"]), wide)
        place = f.add(f.mul(image, c["plane_image"]), f.mul(phase, c["plane_phase"]))
        to = f.offset(c["shared"], f.add(place, f.mul(f.mul(row, c["line"]), CHUNK)), "i8")
        source = f.offset(c["x"], f.add(f.mul(image, c["x_image"]), f.mul(y, c["x_row"])), kind)
        is_high = f.compare("ult", y, c["height"])  # unsigned: what is negative is not inside either
        with f.loop(c["line"]) as column:
            x = f.sub(f.add(f.mul(column.index, c["step_wide"]), wide), c["pad_left"])
            is_inside = f.both(is_high, f.compare("ult", x, c["width"]))
            goal = f.offset(to, f.mul(column.index, CHUNK), "i8")
            with f.when(is_inside):
                pixel = f.offset(source, f.mul(x, c["x_column"]), kind)
                with f.loop(whole) as chunk:
                    values = f.offset(pixel, f.mul(chunk.index, CHUNK), kind)
                    line = f.offset(goal, f.mul(chunk.index, c["plane_chunk"]), "i8")
                    if taken:
                        copied(values, line, CHUNK)
                    else:
                        for k in range(0, CHUNK, width):
                            f.store(bytes_of, level(f.vload(f.offset(values, k))), f.offset(line, k, "i8"), width)
                values = f.offset(pixel, f.mul(whole, CHUNK), kind)
                line = f.offset(goal, f.mul(whole, c["plane_chunk"]), "i8")
                with f.loop(left_over, step=width) as part:
                    place = f.offset(line, part.index, "i8")
                    if taken:
                        copied(f.offset(values, part.index, kind), place, width)
                    else:
                        lanes = f.lanes(f.sub(left_over, part.index))
                        f.store(bytes_of, level(f.vload(f.offset(values, part.index), lanes)), place, width)
            with f.when(f.op(f"xor i1 {is_inside}, true")), f.loop(c["channels"], step=width) as part:
                chunk, inside = f.divmod(part.index, CHUNK)
                line = f.offset(goal, f.add(f.mul(chunk, c["plane_chunk"]), inside), "i8")
                f.store(bytes_of, zero, line, width)


def _constant(width: int, value: int) -> str:
    """A vector of a byte."""
    return f"<{', '.join([f'i8 {value - 256 if value > 127 else value}'] * width)}>"


def fields_of(letter: str) -> list[str]:
    """What `leveller` reads."""
    return [f"{letter}_{name}" for name in ("scale", "reciprocal", "least", "most")]


def leveller(f: Function, c: ContextReader, letter: str, offset: int = 0) -> Callable[[str], str]:
    """What makes bytes of a vector: levels, plus `offset`, by the scale and the bounds of `fields_of`.

    value / scale is rounded as float32's division rounds it: by the reciprocal, and once more by what that leaves over.
    """
    scale, reciprocal, least, most = (number(f, c, name) for name in fields_of(letter))

    def level(value: str) -> str:
        value = between(f, value, least, most)
        quotient = f.vmul(value, reciprocal)
        rest = f.vmuladd(f.op(f"fneg {f.module.vector} {quotient}"), scale, value)
        return as_bytes(f, f.vadd(f.vmuladd(rest, reciprocal, quotient), f.splat(ROUNDER + offset)))

    return level


def offset_of(isa: Isa, signed: bool = False) -> int:
    """What is added to levels that are stored: 128 for VNNI's first factor, which has no sign."""
    return 0 if signed or has_tiles(isa) else 128


def number(f: Function, c: ContextReader, name: str) -> str:
    """A vector of the float whose bits a field holds."""
    return f.spread(f.op(f"bitcast i32 {f.op(f'trunc i64 {c[name]} to i32')} to float"))


def between(f: Function, value: str, least: str, most: str) -> str:
    """`value` with these bounds; what is not a number stays so."""
    v, width = f.module.vector, f.module.width
    for bound, kind in ((least, "olt"), (most, "ogt")):
        outside = f.op(f"fcmp {kind} {v} {value}, {bound}")
        value = f.op(f"select <{width} x i1> {outside}, {v} {bound}, {v} {value}")
    return value


def times(f: Function, value: str, factor: str, offset: int = 0) -> str:
    """value * factor, rounded once, to whole numbers plus `offset` and `ROUNDER`; ties to even."""
    return f.vmuladd(value, factor, f.splat(ROUNDER + offset))


def as_bytes(f: Function, value: str) -> str:
    """The whole numbers that were rounded, as bytes."""
    width = f.module.width
    bits = f.op(f"bitcast {f.module.vector} {value} to <{width} x i32>")
    return f.op(f"trunc <{width} x i32> {bits} to <{width} x i8>")
