"""Winograd's transforms and what follows them, as functions that the Triton kernels call.

A tile's values are a tuple of blocks (tiles, channels), one for each tap, and a matrix is a tuple of rows, each a tuple
of column, factor, column, factor, ... without the zeros: Triton unrolls all of it.
"""
# What Triton compiles is no Python to a type checker.
# pyright: reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

import importlib
from typing import Any

from tersenet.kernels.gpu.host import interpreted

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def combined(values, MATRIX: tl.constexpr, ROW: tl.constexpr):
    """The sum of factor * values[column] over a row of the matrix."""
    total = values[MATRIX[ROW][0]] * MATRIX[ROW][1]
    for term in tl.static_range(2, len(MATRIX[ROW]), 2):
        total += values[MATRIX[ROW][term]] * MATRIX[ROW][term + 1]
    return total


@triton.jit
def place(tile, tiles_high, tiles_wide):
    """Image, row and column of a tile."""
    rest = tile // tiles_wide
    return (rest // tiles_high).to(tl.int64), rest % tiles_high, tile % tiles_wide


@triton.jit
def transformed(
    x, tile, real, channel, channels, height, width, tiles_high, tiles_wide, pad_top, pad_left,
    x_image, x_row, x_column, BT: tl.constexpr, TILE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """B^T d B, or its ReLU, of the tiles `tile` where they are `real`; tap (i, j) is number j * t + i."""
    image, row, column = place(tile, tiles_high, tiles_wide)
    top = row * TILE - pad_top
    left = column * TILE - pad_left
    start = x + image * x_image
    is_channel = (channel < channels)[None, :]
    rows = ()
    for i in tl.static_range(len(BT)):
        in_rows = real & (top + i >= 0) & (top + i < height)
        loaded = ()
        for j in tl.static_range(len(BT)):
            inside = in_rows & (left + j >= 0) & (left + j < width)
            at = (start + (top + i) * x_row + (left + j) * x_column)[:, None] + channel[None, :]
            loaded += (tl.load(at, mask=inside[:, None] & is_channel, other=0.0).to(tl.float32),)
        for j in tl.static_range(len(BT)):
            rows += (combined(loaded, BT, j),)
    taps = ()
    for j in tl.static_range(len(BT)):
        down = ()
        for i in tl.static_range(len(BT)):
            down += (rows[i * len(BT) + j],)
        for i in tl.static_range(len(BT)):
            tap = combined(down, BT, i)
            if RELU:
                tap = tl.where(tap < 0, 0.0, tap)  # what is not a number stays so
            taps += (tap,)
    return taps


@triton.jit
def added(left, right, total, PRECISION: tl.constexpr):
    """total + left right"""
    if _INTERPRETED:  # the interpreter multiplies the bits of bfloat16 numbers as if they were integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """What is not a number stays so."""
    if ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == "relu6":
        value = tl.where(value > 6, 6.0, value)
    return value


@triton.jit
def written(
    rows, y, table, residual, tile, real, channel, channels, padded, out_height, out_width, tiles_high, tiles_wide,
    y_image, y_row, y_column, r_image, r_row, r_column,
    AT: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The outputs of tiles, from rows of products times A: number i * m + j is row i, output column j."""
    image, row, column = place(tile, tiles_high, tiles_wide)
    is_channel = (channel < channels)[None, :]
    bias = tl.load(table + channel, mask=channel < channels, other=0.0)[None, :]
    factor = tl.load(table + padded + channel, mask=channel < channels, other=0.0)[None, :]
    for j in tl.static_range(len(AT)):
        down = ()
        for i in tl.static_range(len(AT) + 2):
            down += (rows[i * len(AT) + j],)
        at_column = column * len(AT) + j
        for i in tl.static_range(len(AT)):
            at_row = row * len(AT) + i
            inside = (real & (at_row < out_height) & (at_column < out_width))[:, None] & is_channel
            value = combined(down, AT, i) * factor + bias
            if RESIDUAL:
                source = (residual + image * r_image + at_row * r_row + at_column * r_column)[:, None] + channel[
                    None, :
                ]
                value += tl.load(source, mask=inside, other=0.0).to(tl.float32)
            at = (y + image * y_image + at_row * y_row + at_column * y_column)[:, None] + channel[None, :]
            tl.store(at, activated(value, ACTIVATION).to(y.dtype.element_ty), mask=inside)
