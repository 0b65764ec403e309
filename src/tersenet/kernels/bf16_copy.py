"""The padded image in bfloat16, where AMX's tiles read it, in IR."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from tersenet.kernels.bf16_values import BITS, PAIR, line_of, store_line
from tersenet.kernels.context import ContextReader
from tersenet.kernels.ir import Function, Module

_COPIED = "ptr %context, ptr noalias %v, i64 %image, i64 %row, i64 %images, i64 %rows"
_FIELDS = (
    "x", "x_image", "x_row", "x_column", "height", "channels", "groups", "pad_top", "step_high", "phases",
    "copy_left", "copy_count", "copy_first", "copy_wide", "copy_step", "v_row", "v_phase", "v_image", "v_vector",
)  # fmt: skip


def copy_functions(module: Module) -> None:
    """`copy`: V of `%rows` output rows from `%row` on, of `%images` images from `%image` on. See `bf16` for V."""
    for half in (False, True):
        _chunks(module, half)
        _rows(module, half)
    f = module.function("copy", _COPIED)
    c = ContextReader(f, "x_half", "interleaved")
    names = ("copy_chunks_float", "copy_chunks_half", "copy_rows_float", "copy_rows_half")
    f.switch(
        f.add(f.mul(c["interleaved"], 2), c["x_half"]),
        {
            number: lambda name=name: f.call(name, *_COPIED.replace("noalias ", "").split(", "))
            for number, name in enumerate(names)
        },
    )


def _chunks(module: Module, half: bool) -> None:
    """Each position has 32 channels; the chunks of channels lie `v_vector` apart."""
    f = module.function(f"copy_chunks_{_name(half)}", _COPIED)
    c = ContextReader(f, *_FIELDS, "chunks")
    whole = f.divmod(c["channels"], PAIR)[0]
    rest = f.sub(c["channels"], f.mul(whole, PAIR))
    vectors = f.mul(c["groups"], c["chunks"])
    with _each_row(f, c, half) as (source, target, left, count):
        after = f.add(left, count)
        with f.loop(vectors) as chunk:
            line = f.offset(target, f.mul(chunk.index, c["v_vector"]), BITS)
            for begin, end in (("0", left), (after, c["copy_wide"])):
                with f.loop(end, start=begin) as place:
                    store_line(f, "zeroinitializer", f.offset(line, f.mul(place.index, PAIR), BITS), align=64)
        first = f.offset(target, f.mul(left, PAIR), BITS)
        with f.loop(count) as place:
            pixel = _at(f, half, source, f.mul(place.index, f.mul(c["copy_step"], c["x_column"])))
            own = f.offset(first, f.mul(place.index, PAIR), BITS)
            with f.loop(c["groups"]) as group:
                read = _at(f, half, pixel, f.mul(group.index, c["channels"]))
                written = f.offset(own, f.mul(f.mul(group.index, c["chunks"]), c["v_vector"]), BITS)
                with f.loop(whole) as chunk:
                    value = line_of(f, half, _at(f, half, read, f.mul(chunk.index, PAIR)))
                    store_line(f, value, f.offset(written, f.mul(chunk.index, c["v_vector"]), BITS), align=64)
                with f.when(f.compare("ne", rest, 0)):
                    value = line_of(f, half, _at(f, half, read, f.mul(whole, PAIR)), rest)
                    store_line(f, value, f.offset(written, f.mul(whole, c["v_vector"]), BITS), align=64)


def _rows(module: Module, half: bool) -> None:
    """Positions have the image's few channels and follow each other; 32 numbers behind the last row are zero."""
    f = module.function(f"copy_rows_{_name(half)}", _COPIED)
    c = ContextReader(f, *_FIELDS)
    with f.loop("%images") as image, f.loop(c["phases"]) as phase:
        behind = f.add(f.mul(image.index, c["v_image"]), f.mul(phase.index, c["v_phase"]))
        behind = f.offset("%v", f.add(behind, f.mul("%rows", c["v_row"])), BITS)
        store_line(f, "zeroinitializer", behind)
    with _each_row(f, c, half) as (source, target, left, count):
        with f.loop(c["v_row"], step=PAIR) as place:
            store_line(f, "zeroinitializer", f.offset(target, place.index, BITS), f.sub(c["v_row"], place.index))
        first = f.offset(target, f.mul(left, c["channels"]), BITS)
        numbers = f.mul(count, c["channels"])
        whole = f.mul(f.divmod(numbers, PAIR)[0], PAIR)
        with f.loop(whole, step=PAIR) as place:
            store_line(f, line_of(f, half, _at(f, half, source, place.index)), f.offset(first, place.index, BITS))
        rest = f.sub(numbers, whole)
        with f.when(f.compare("ne", rest, 0)):
            value = line_of(f, half, _at(f, half, source, whole), rest)
            store_line(f, value, f.offset(first, whole, BITS), rest)


@contextmanager
def _each_row(f: Function, c: ContextReader, half: bool) -> Generator[tuple[str, str, str, str]]:
    """For each row of V: the first pixel to copy, the row, the positions left of that pixel, and how many to copy."""
    with f.loop("%images") as image, f.loop(c["phases"]) as phase, f.loop("%rows") as row:
        y = f.sub(f.add(f.mul(f.add("%row", row.index), c["step_high"]), phase.index), c["pad_top"])
        inside = f.compare("ult", y, c["height"])  # unsigned: what is negative is not inside either
        source = f.add(f.mul(f.add("%image", image.index), c["x_image"]), f.mul(y, c["x_row"]))
        source = _at(f, half, c["x"], f.add(source, f.mul(c["copy_first"], c["x_column"])))
        target = f.add(f.mul(image.index, c["v_image"]), f.mul(phase.index, c["v_phase"]))
        target = f.offset("%v", f.add(target, f.mul(row.index, c["v_row"])), BITS)
        left = f.op(f"select i1 {inside}, i64 {c['copy_left']}, i64 {c['copy_wide']}")
        yield source, target, left, f.op(f"select i1 {inside}, i64 {c['copy_count']}, i64 0")


def _at(f: Function, half: bool, pointer: str, index: str) -> str:
    return f.offset(pointer, index, BITS if half else "float")


def _name(half: bool) -> str:
    return "half" if half else "float"
