"""How one call is cut into blocks of tiles, from the sizes and the processor's caches."""

from __future__ import annotations

from dataclasses import dataclass

from tersenet.kernels.generate import Algorithm
from tersenet.kernels.product import QUAD

_L2_SHARE = 0.6  # of a core's second-level cache, for V or M of a block; weights pass through the rest
_BLOCK_TILES = 28  # more tiles use a weight more often, but V grows out of the cache: best from 64 to 512 channels
_FEW_TILES = 64  # up to here one V for all tiles is small, and each weight is read once
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_SLICE_CHANNELS = 128  # input channels whose weights stay in the first-level cache


@dataclass(frozen=True)
class Plan:
    """Tiles of a block; whether all blocks share one V; how many blocks of output channels and quads of input channels
    are taken together.

    It decides about speed only: results are the same, bit for bit, for all plans.
    """

    block: int
    shared: bool
    output_step: int
    quad_step: int


def plan(algorithm: Algorithm, tiles: int, in_channels: int, out_channels: int, threads: int, l2_bytes: int) -> Plan:
    """The cut for `tiles` tiles on `threads` threads."""
    isa, taps = algorithm.isa, algorithm.t**2
    outputs = -(-out_channels // isa.channels)
    shared = tiles <= _FEW_TILES
    output_step = 1
    if shared:
        blocks = -(-_UNITS_PER_THREAD * threads // outputs) if threads > 1 else 1
        block = max(isa.rows, -(-tiles // blocks))
        budget = int(_L2_SHARE * l2_bytes)
        if 4 * taps * block * in_channels > budget:  # V comes from afar each time: as many output channels as M allows
            most = budget // (4 * taps * block * isa.channels)
            output_step = max(1, min(most, outputs // (_UNITS_PER_THREAD * threads if threads > 1 else 1)))
    else:
        groups = round(_BLOCK_TILES / isa.rows)
        per_thread = tiles // (_UNITS_PER_THREAD * threads * isa.rows) if threads > 1 else groups
        block = isa.rows * max(1, min(groups, per_thread))
    quads = (min(in_channels, _SLICE_CHANNELS) + QUAD - 1) // QUAD
    return Plan(min(block, tiles), shared, output_step, quads)
