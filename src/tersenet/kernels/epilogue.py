"""What is done to a result before it is written, in IR: residual and activation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersenet.kernels.context import ContextReader
from tersenet.kernels.ir import Function

# exp(r) for |r| <= ln 2 / 2: the Taylor polynomial of degree 7, relative error below 1e-8.
_EXP = [1 / math.factorial(k) for k in range(8)]
_LN2_HIGH = 0.693359375  # few bits, so that its product with a small integer is exact
_LN2_LOW = math.log(2) - _LN2_HIGH
_EXP_LARGEST = 87.0  # beyond, 2^n leaves the range of float32
_ROUNDER = 1.5 * 2**23  # adding and subtracting it rounds to whole numbers


def residual_added(
    f: Function, c: ContextReader, values: list[str], places: Sequence[str], masks: Sequence[str] | None = None
) -> list[str]:
    """`values` plus what is at `places`, with masks in their lanes only, if the call has a residual."""
    lanes = masks or [None] * len(places)
    return f.choose(
        f.op(f"icmp ne ptr {c['r']}, null"),
        f.module.vector,
        lambda: [f.vadd(value, f.vload(place, mask)) for value, place, mask in zip(values, places, lanes, strict=True)],
        lambda: values,
    )


def clamped(f: Function, c: ContextReader, values: list[str]) -> list[str]:
    """Between `low` and `high`; what is not a number stays so, as torch has it."""
    v, width = f.module.vector, f.module.width
    for name, kind in (("low", "olt"), ("high", "ogt")):
        bound = f.spread(f.op(f"bitcast i32 {f.op(f'trunc i64 {c[name]} to i32')} to float"))
        outside = [f.op(f"fcmp {kind} {v} {x}, {bound}") for x in values]
        values = [
            f.op(f"select <{width} x i1> {out}, {v} {bound}, {v} {x}") for out, x in zip(outside, values, strict=True)
        ]
    return values


def finished(
    f: Function, c: ContextReader, values: list[str], places: Sequence[str], masks: Sequence[str]
) -> list[str]:
    """`values` plus the residual at `places`, in the lanes of `masks`, and then whatever activation the call has."""
    values = residual_added(f, c, values, places, masks)
    return f.choose(
        f.compare("ne", c["silu"], 0),
        f.module.vector,
        lambda: [silu(f, value) for value in values],
        lambda: clamped(f, c, values),
    )


def silu(f: Function, x: str) -> str:
    """x / (1 + exp(-x)). Below -87 the result is that of -87, -1.4e-36: beyond, exp would overflow."""
    v = f.module.vector
    x = _at_least(f, x, -_EXP_LARGEST)
    power = _exp(f, _at_least(f, f.op(f"fneg {v} {x}"), -_EXP_LARGEST))
    return f.op(f"fdiv {v} {x}, {f.vadd(power, f.splat(1))}")


def _at_least(f: Function, x: str, limit: float) -> str:
    v = f.module.vector
    below = f.op(f"fcmp olt {v} {x}, {f.splat(limit)}")
    return f.op(f"select <{f.module.width} x i1> {below}, {v} {f.splat(limit)}, {v} {x}")


def _exp(f: Function, x: str) -> str:
    """2^n exp(x - n ln 2), for |x| up to 87; 2^n is put together from its bits."""
    v, w = f.module.vector, f.module.width
    shifted = f.vmuladd(x, f.splat(1 / math.log(2)), f.splat(_ROUNDER))
    n = f.vsub(shifted, f.splat(_ROUNDER))
    rest = f.vmuladd(n, f.splat(-_LN2_LOW), f.vmuladd(n, f.splat(-_LN2_HIGH), x))
    total = f.splat(_EXP[-1])
    for factor in reversed(_EXP[:-1]):
        total = f.vmuladd(total, rest, f.splat(factor))
    # The low bits of `shifted` are n.
    exponent = f.op(f"shl <{w} x i32> {f.op(f'bitcast {v} {shifted} to <{w} x i32>')}, {_integers(w, 23)}")
    scaled = f.op(f"add <{w} x i32> {exponent}, {f.op(f'bitcast {v} {total} to <{w} x i32>')}")
    return f.op(f"bitcast <{w} x i32> {scaled} to {v}")


def _integers(width: int, value: int) -> str:
    return "<" + ", ".join([f"i32 {value}"] * width) + ">"
