"""Sizes and strides of one call, as far as they do not depend on where its tensors are."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from tersenet.kernels.amx import CHUNK, LINE, TILE
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.generate import Algorithm, R
from tersenet.kernels.host import host
from tersenet.kernels.plan import Plan, plan
from tersenet.kernels.product import QUAD
from tersenet.kernels.scattered import SLICE

_THREAD_MACS = 2**18  # less than about 3 microseconds of work is not worth waking a thread

Pair = tuple[int, int]
Shape = tuple[int, int, int, int]


def output_shape(x: Shape, out_channels: int, padding: Pair) -> Shape:
    """(N, C_out, H', W') of a 3x3 convolution with stride 1."""
    return x[0], out_channels, x[2] + 2 * padding[0] - R + 1, x[3] + 2 * padding[1] - R + 1


def image_size(
    size: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair = (1, 1)
) -> Pair:
    """(H', W') of a convolution of an image of `size` (H, W)."""
    high, wide = (
        (length + 2 * pad - apart * (taps - 1) - 1) // step + 1
        for length, taps, step, pad, apart in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return high, wide


@dataclass(frozen=True)
class Layout:
    """The context with everything but addresses and tensors' strides; threads; scratch in floats."""

    context: bytes
    shared: bool
    threads: int
    shared_floats: int
    thread_floats: int


@functools.lru_cache(maxsize=4096)
def layout(
    algorithm: Algorithm, x: Shape, padding: Pair, out_channels: int, threads: int, cut: Plan | None = None
) -> Layout:
    """For an input of the shape `x` and an output that is not empty. `cut` takes the place of the planned one."""
    isa, taps = algorithm.isa, algorithm.t**2
    images, channels, height, width = x
    _, _, out_height, out_width = output_shape(x, out_channels, padding)
    high, wide = -(-out_height // algorithm.m), -(-out_width // algorithm.m)
    tiles = images * high * wide
    cut = cut or plan(algorithm, tiles, channels, out_channels, threads, host().l2_bytes)
    vectors, outputs = -(-channels // isa.width), -(-out_channels // isa.channels)
    blocks = -(-tiles // cut.block)
    # One line between taps: with strides of a power of two they would all meet in the same set of the cache.
    v_vector = m_vector = cut.block * isa.width
    chunks = 0
    if algorithm.parts:
        chunks = -(-channels // CHUNK)
        vectors = 2 * chunks  # the last one may have no channels, and is zero
        m_vector = -(-cut.block // LINE) * TILE
        v_vector = algorithm.parts * m_vector
    v_tap, m_tap = (chunks or vectors) * v_vector + LINE, isa.columns * m_vector + LINE
    own = taps * cut.groups * (cut.output_step * m_tap + (0 if cut.shared else v_tap))
    units = -(-blocks // cut.groups)
    fields = {
        "height": height, "width": width, "channels": channels, "pad_top": padding[0], "pad_left": padding[1],
        "out_height": out_height, "out_width": out_width, "out_channels": out_channels,
        "tiles": tiles, "tiles_high": high, "tiles_wide": wide, "block": cut.block, "block_count": blocks,
        "vectors": vectors, "chunks": chunks, "size_high": 1, "size_wide": 1, "v_low": v_vector // 2,
        "quads": -(-channels // QUAD), "quad_step": cut.quad_step, "outputs": outputs,
        "v_tap": v_tap, "v_vector": v_vector, "v_block": taps * v_tap, "m_tap": m_tap, "m_vector": m_vector,
        "m_block": taps * m_tap, "output_step": cut.output_step,
        "groups": cut.groups, "group_count": units, "slices": -(-channels // SLICE),
        "scratch_stride": own, "bias_scale": outputs * isa.channels,
    }  # fmt: skip
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    worth = max(1, tiles * taps * channels * out_channels // _THREAD_MACS)
    if cut.shared:
        units *= -(-outputs // cut.output_step)
    return Layout(
        ctypes.string_at(context, ctypes.sizeof(context)),
        cut.shared,
        min(threads, units, worth),
        blocks * taps * v_tap if cut.shared else 0,
        own,
    )
