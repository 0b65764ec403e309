"""How one call is cut into blocks of tiles, from the sizes and the processor's caches."""

from __future__ import annotations

from dataclasses import dataclass

from tersenet.kernels.amx import GROUP, LINE
from tersenet.kernels.generate import Algorithm
from tersenet.kernels.product import QUAD
from tersenet.kernels.scattered import GROUPS

_SPARSE_SHARE = 0.6  # of a core's second-level cache, for M of a pruned weight: V passes by once, a tap at a time
_PARTS_CHANNELS, _PARTS_GROUPS = 64, 4  # one group of tiles for so many channels, and at most so many groups
_BLOCK_TILES = 28  # more tiles use a weight more often, but V grows out of the cache: best from 64 to 512 channels
_FEW_TILES = 64  # up to here one V for all tiles is small, and each weight is read once
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_SLICE_CHANNELS = 128  # input channels whose weights stay in the first-level cache


@dataclass(frozen=True)
class Plan:
    """Tiles of a block; whether all blocks share one V; how many blocks of output channels, quads of input channels
    and, with tiles in the lanes, blocks of tiles are taken together.

    It decides about speed only: results are the same, bit for bit, for all plans of the same `groups`.
    """

    block: int
    shared: bool
    output_step: int
    quad_step: int
    groups: int = 1


def plan(algorithm: Algorithm, tiles: int, in_channels: int, out_channels: int, threads: int, l2_bytes: int) -> Plan:
    """The cut for `tiles` tiles on `threads` threads."""
    isa, taps = algorithm.isa, algorithm.t**2
    outputs = -(-out_channels // isa.channels)
    if algorithm.weight == "scattered":
        return _scattered(algorithm, tiles, outputs, threads, l2_bytes)
    if algorithm.parts:
        return _parts(tiles, in_channels, outputs, threads)
    shared = tiles <= _FEW_TILES
    output_step = 1  # so that a weight is read in the order of memory
    if shared:
        blocks = -(-_UNITS_PER_THREAD * threads // outputs) if threads > 1 else 1
        block = max(isa.rows, -(-tiles // blocks))
    else:
        # A pruned weight is small, so it may be read again for every group of tiles.
        groups = 1 if algorithm.weight == "sparse" else round(_BLOCK_TILES / isa.rows)
        per_thread = tiles // (_UNITS_PER_THREAD * threads * isa.rows) if threads > 1 else groups
        block = isa.rows * max(1, min(groups, per_thread))
    if algorithm.weight == "sparse":
        # So little is multiplied that V passing by for each block of outputs would take longer than that.
        most = max(1, int(_SPARSE_SHARE * l2_bytes) // (4 * taps * block * isa.channels))
        units = 1 if shared else -(-outputs // most)  # the V of all tiles comes from farther than any M
        if shared and threads > 1:
            units = -(-_UNITS_PER_THREAD * threads * block // tiles)
        output_step = -(-outputs // min(units, outputs))
    quads = (min(in_channels, _SLICE_CHANNELS) + QUAD - 1) // QUAD
    return Plan(min(block, tiles), shared, output_step, quads)


def _parts(tiles: int, in_channels: int, outputs: int, threads: int) -> Plan:
    """AMX multiplies faster than weights come from afar, so that with many channels, and with them weights, more tiles
    are taken together than the cache holds; and all outputs, so that a tap of V comes near once."""
    groups = max(1, min(_PARTS_GROUPS, in_channels // _PARTS_CHANNELS))
    if threads == 1:
        blocks = -(-tiles // (GROUP * groups))  # of one size: a small last one would read all weights as well
        return Plan(-(-tiles // blocks), False, outputs, 1)
    if tiles > _FEW_TILES:
        per_thread = tiles // (_UNITS_PER_THREAD * threads * GROUP)
        return Plan(GROUP * max(1, min(groups, per_thread)), False, outputs, 1)
    if tiles > LINE * threads:  # what one thread transforms comes slowly to another one
        return Plan(-(-tiles // threads), False, outputs if groups == _PARTS_GROUPS else 1, 1)
    return Plan(tiles, True, max(1, outputs // (_UNITS_PER_THREAD * threads)), 1)


def _scattered(algorithm: Algorithm, tiles: int, outputs: int, threads: int, l2_bytes: int) -> Plan:
    """`groups` follows from the tiles alone: sums are made in an order that depends on it."""
    isa = algorithm.isa
    blocks = -(-tiles // isa.width)
    groups = min(GROUPS, blocks)
    units = -(-blocks // groups)
    shared = threads > 1 and units < _UNITS_PER_THREAD * threads
    bytes_of_step = 4 * algorithm.t**2 * groups * isa.width * isa.channels
    output_step = max(1, min(outputs, int(_SPARSE_SHARE * l2_bytes) // bytes_of_step))
    if shared:
        output_step = max(1, min(output_step, outputs * units // (_UNITS_PER_THREAD * threads)))
    return Plan(isa.width, shared, output_step, 1, groups)
