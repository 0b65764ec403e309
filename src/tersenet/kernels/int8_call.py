"""One call of a quantized convolution in integers: how it is cut, memory, threads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.gemm_call import Cut
from tersenet.kernels.host import host
from tersenet.kernels.int8_pack import PackedInt8, Pair, Rounded
from tersenet.kernels.int8_product import CHUNK, group_of
from tersenet.kernels.int8_quantize import ROUNDER, fields_of, offset_of
from tersenet.kernels.int8_winograd import LINE
from tersenet.kernels.winograd import BITS, Call

_L2_SHARE = 0.4  # of a core's second-level cache, for V and M
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_THREAD_MACS = 2**20  # less than about 3 microseconds of work is not worth waking a thread
_BEYOND = 64  # lines behind the last one that a product may read


@dataclass(frozen=True)
class _Plane:
    """Lines of 64 bytes in which the levels of an image lie."""

    rows: int
    line: int
    phases: Pair
    chunks: int

    @property
    def chunk(self) -> int:
        return self.rows * self.line * CHUNK

    @property
    def phase(self) -> int:
        return self.chunks * self.chunk

    @property
    def image(self) -> int:
        return self.phases[0] * self.phases[1] * self.phase


def int8_call(
    packed: PackedInt8,
    x: Sequence[int],
    x_strides: Sequence[int],
    activation: str,
    threads: int,
    cut: Cut | None = None,
    taken: bool = False,
    given: Rounded | None = None,
) -> Call:
    """For inputs (N, C_in, H, W) whose channels lie together, and a residual that is contiguous in channels-last
    memory. Nothing is checked.

    taken: the input is int8, its levels; its channels are a multiple of 16.
    given: the result is int8, the levels of this rounding; its channels are a multiple of 16.
    """
    moves, dtype = packed.moves, torch.float32 if given is None else torch.int8
    images, channels, height, width = x
    shape = (images, packed.out_channels, moves.out(height, 0), moves.out(width, 1))
    if min(shape) < 1:
        return Call(shape, b"", (), 1, 0, 0, dtype=dtype)
    plane, fields, own = (_winograd if packed.algorithm.at else _direct)(packed, shape, threads, cut)
    algorithm = replace(packed.algorithm, taken=taken, given=given is not None)
    (low, high), outputs = BITS[activation], -(-shape[1] // algorithm.isa.channels)
    fields |= {
        "x_image": x_strides[0], "x_row": x_strides[2], "x_column": x_strides[3], "channels": channels,
        "height": height, "width": width, "pad_top": moves.padding[0], "pad_left": moves.padding[2],
        "step_high": moves.stride[0], "step_wide": moves.stride[1],
        "copy_high": plane.phases[0], "copy_wide": plane.phases[1], "line": plane.line, "plane_rows": plane.rows,
        "plane_chunk": plane.chunk, "plane_phase": plane.phase, "plane_image": plane.image,
        "units": images * plane.phases[0] * plane.phases[1] * plane.rows, "chunks": plane.chunks,
        "out_height": shape[2], "out_width": shape[3], "out_channels": shape[1],
        "outputs": outputs, "initial": packed.initial, "taps": packed.taps,
        "bias_scale": outputs * algorithm.isa.channels, "low": low, "high": high, "scratch_stride": own,
        "wide": packed.wide, "factor_tap": packed.factor_tap, "factors": packed.factors,
    }  # fmt: skip
    for letter, rounding in (("x", packed.input), ("z", given)):
        if rounding is not None:
            scale, lowest, highest = rounding
            # The bounds are between levels, so that rounding ends in them.
            values = (scale, 1 / scale, (lowest - 0.25) * scale, (highest + 0.25) * scale)
            fields |= _bits(**dict(zip(fields_of(letter), values, strict=True)))
    offset = ROUNDER + offset_of(algorithm.isa)
    for name, bounds_of, zero in (
        ("v", packed.transformed, offset),
        ("s", packed.product, ROUNDER),
        ("y", packed.output, ROUNDER),
    ):
        for end, level in zip(("least", "most"), bounds_of, strict=True):
            fields |= _bits(**{f"{name}_{end}": zero + level})
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    macs = shape[0] * shape[2] * shape[3] * shape[1] * channels * packed.taps
    count = max(1, min(threads, macs // _THREAD_MACS))
    shared = -(-(images * plane.image + _BEYOND * CHUNK) // CHUNK) * CHUNK
    tasks = kernels(algorithm).tasks
    ordered = tuple(tasks[name] for name in algorithm.tasks)
    return Call(shape, bytes(context), ordered, count, shared // 4 + count * own, shared, True, dtype)


Made = tuple[_Plane, dict[str, int], int]


def _direct(packed: PackedInt8, shape: Sequence[int], threads: int, cut: Cut | None) -> Made:
    """Its plane, its own fields, and the scratch of a thread in floats."""
    isa, moves = packed.algorithm.isa, packed.moves
    images, _, high, wide = shape
    rows, columns = ((moves.reach(axis) - 1) // moves.stride[axis] for axis in (0, 1))
    plane = _Plane(high + rows, wide + columns, moves.phases, -(-packed.in_channels // CHUNK))
    pixels, outputs = (high - 1) * plane.line + wide, -(-packed.out_channels // isa.channels)
    group = group_of(isa)
    cut = cut or _cut(pixels, images, packed.taps * packed.out_channels, outputs, group, threads)
    blocks = -(-pixels // cut.block)
    fields = {
        "tiles": pixels, "block": cut.block, "block_count": blocks, "group_count": images * blocks,
        "output_step": cut.output_step, "v_vector": plane.chunk, "m_vector": group * isa.width,
    }  # fmt: skip
    return plane, fields, group * isa.channels + LINE


def _cut(pixels: int, images: int, weights: int, outputs: int, group: int, threads: int) -> Cut:
    """All pixels of an image in one block; threads share out what is larger, the weights or the pixels."""
    groups, blocks, steps = -(-pixels // group), 1, 1
    units = _UNITS_PER_THREAD * threads
    if threads > 1 and weights > pixels * images:
        steps = min(outputs, units)
    elif threads > 1:
        blocks = min(groups, -(-units // images))
    return Cut(-(-groups // blocks) * group, -(-outputs // steps))


def _winograd(packed: PackedInt8, shape: Sequence[int], threads: int, cut: Cut | None) -> Made:
    """The same for Winograd."""
    algorithm, isa = packed.algorithm, packed.algorithm.isa
    images, _, high, wide = shape
    m, taps, chunks = len(algorithm.at), len(algorithm.bt) ** 2, -(-packed.in_channels // CHUNK)
    rows, columns = -(-high // m), -(-wide // m)
    over = len(algorithm.bt) - m
    plane = _Plane(rows * m + over, columns * m + over, (1, 1), chunks)
    tiles, outputs = images * rows * columns, -(-packed.out_channels // isa.channels)
    group = group_of(isa)
    if cut is None:
        of_tile = taps * (chunks * CHUNK + 4 * isa.channels)
        most = max(1, int(_L2_SHARE * host().l2_bytes) // (of_tile * group))
        blocks = -(-tiles // (group * most))
        if threads > 1:
            blocks = max(blocks, min(-(-tiles // group), _UNITS_PER_THREAD * threads))
        steps = min(outputs, -(-_UNITS_PER_THREAD * threads // blocks)) if threads > 1 else 1
        cut = Cut(-(-tiles // blocks), -(-outputs // steps))
    blocks = -(-tiles // cut.block)
    lines = -(-cut.block // group) * group
    v_vector, m_vector = lines * CHUNK, lines * isa.width
    # One line between taps: with strides of a power of two they would all meet in the same set of the cache.
    v_tap, m_tap = chunks * v_vector + CHUNK, isa.columns * m_vector + LINE
    fields = {
        "tiles": tiles, "tiles_high": rows, "tiles_wide": columns, "block": cut.block, "block_count": blocks,
        "output_step": cut.output_step, "v_vector": v_vector, "v_tap": v_tap, "v_block": taps * v_tap,
        "m_vector": m_vector, "m_tap": m_tap,
    }  # fmt: skip
    return plane, fields, LINE + taps * v_tap // 4 + taps * m_tap + LINE


def _bits(**values: float) -> dict[str, int]:
    return {name: struct.unpack("<I", struct.pack("<f", value))[0] for name, value in values.items()}
