"""The epilogue of bfloat16 convolutions, in IR: bias, residual and activation, in float32, and one rounding."""

from __future__ import annotations

from functools import partial

from tersenet.kernels.amx import LINE
from tersenet.kernels.bf16_values import BITS, line, load_floats, store_floats, store_line
from tersenet.kernels.context import ContextReader
from tersenet.kernels.epilogue import clamped, silu
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

TALL = 64  # pixels whose sums are kept together
_PARAMETERS = "ptr %context, ptr noalias %m, ptr noalias %bias, ptr %r, ptr %y, i64 %pixel, i64 %count, i64 %channels"
_RESIDUALS = ("none", "float", "half")
_RESULTS = ("float", "half")


def finish_functions(module: Module, isa: Isa) -> None:
    """`finish`: results of the `%count` pixels from `%pixel` of an image on, whose sums are in `%m`, for up to
    `%channels` channels. Pixels in the columns of padding are passed over."""
    kinds = [(residual, result) for residual in _RESIDUALS for result in _RESULTS]
    for careful in (False, True):
        for residual, result in kinds:
            _finish(module, isa, careful, residual, result)
    f = module.function("finish", _PARAMETERS)
    c = ContextReader(f, "r", "r_half", "y_half", "silu")
    full = f.both(f.compare("sge", "%channels", isa.channels), f.compare("eq", c["silu"], 0))
    has = f.op(f"icmp ne ptr {c['r']}, null")
    has = f.op(f"zext i1 {has} to i64")
    kind = f.add(f.mul(f.mul(has, f.add(c["r_half"], 1)), len(_RESULTS)), c["y_half"])
    typed = _PARAMETERS.replace("noalias ", "").split(", ")
    first = f.op(f"select i1 {full}, i64 0, i64 {len(kinds)}")
    names = [_name(careful, *one) for careful in (False, True) for one in kinds]
    f.switch(f.add(first, kind), {number: partial(f.call, name, *typed) for number, name in enumerate(names)})


def _name(careful: bool, residual: str, result: str) -> str:
    return f"finish_{residual}_{result}" + ("_careful" if careful else "")


def _finish(module: Module, isa: Isa, careful: bool, residual: str, result: str) -> None:
    """`careful`: not all channels may exist, or the activation is no cut."""
    f = module.function(_name(careful, residual, result), _PARAMETERS)
    c = ContextReader(f, "line", "out_width", "out_channels", "low", "high", "silu")
    row, column = f.divmod("%pixel", c["line"])
    with f.loop("%count", carry=[("i64", row), ("i64", column)]) as pixel:
        row, column = pixel.values
        with f.when(f.compare("slt", column, c["out_width"])):
            place = f.mul(f.add(f.mul(row, c["out_width"]), column), c["out_channels"])
            sums = f.offset("%m", f.mul(pixel.index, LINE))
            if careful:
                for k in range(isa.columns):
                    _some(f, isa, c, k, sums, place, residual, result)
            else:
                _all(f, isa, c, sums, place, residual, result)
        pixel.next(f.following(row, column, c["line"]))


def _all(f: Function, isa: Isa, c: ContextReader, sums: str, place: str, residual: str, result: str) -> None:
    values = [
        f.vadd(f.vload(f.offset(sums, k * TALL * LINE), align=64), f.vload(f.offset("%bias", k * isa.width)))
        for k in range(isa.columns)
    ]
    if residual != "none":
        values = [f.vadd(value, _residual(f, isa, place, k, residual)) for k, value in enumerate(values)]
    values = clamped(f, c, values)
    y = _at(f, result, "%y", place)
    if result == "half":
        store_line(f, line(f, *values), y)
    else:
        for k, value in enumerate(values):
            f.vstore(value, f.offset(y, k * isa.width))


def _some(f: Function, isa: Isa, c: ContextReader, k: int, sums: str, place: str, residual: str, result: str) -> None:
    """A vector of channels of one pixel."""
    begin = k * isa.width
    with f.when(f.compare("sgt", "%channels", begin)):
        lanes = f.lanes(f.sub("%channels", begin))
        value = f.vadd(f.vload(f.offset(sums, k * TALL * LINE), align=64), f.vload(f.offset("%bias", begin)))
        if residual != "none":
            value = f.vadd(value, _residual(f, isa, place, k, residual, lanes))
        (value,) = f.choose(
            f.compare("ne", c["silu"], 0), f.module.vector, lambda: [silu(f, value)], lambda: clamped(f, c, [value])
        )
        store_floats(f, result == "half", value, _at(f, result, "%y", f.add(place, begin)), lanes)


def _residual(f: Function, isa: Isa, place: str, k: int, kind: str, mask: str | None = None) -> str:
    return load_floats(f, kind == "half", _at(f, kind, "%r", f.add(place, k * isa.width)), mask)


def _at(f: Function, kind: str, pointer: str, index: str) -> str:
    return f.offset(pointer, index, BITS if kind == "half" else "float")
