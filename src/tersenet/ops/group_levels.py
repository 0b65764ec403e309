"""Nested ways to split a convolution's channels into groups, and which of them a weight fits. Pure arithmetic.

The levels of a layer are nested group counts, such as (1, 2, 4, 8); level g (from 1) has `counts[g - 1]` groups. S is
the (C_out, C_in) matrix of the kernels' l1 norms with rows and columns in the order that is being learned.

Source: Zhang et al., Model-Agnostic Structured Sparsification with Learnable Channel Shuffle, arXiv 2002.08127.
Differs: the finest level can be reached; odd and dead layers have level 1, where the reference has half a group; nested
    splits by odd factors too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def group_counts(C_out: int, C_in: int, any_divisor: bool = False) -> tuple[int, ...]:
    """The nested group counts of a layer, from 1 on: powers of two, or splits by every prime factor, small ones first.

    64 and 256 channels have 1, 2, 4, ..., 64; 12 and 18 have 1, 2, or with `any_divisor` 1, 2, 6.
    """
    counts, rest, factor = [1], math.gcd(C_out, C_in), 2
    while rest > 1 and (factor == 2 or any_divisor):
        if rest % factor == 0:
            counts.append(counts[-1] * factor)
            rest //= factor
        else:
            factor += 1
    return tuple(counts)


def allowed_levels(counts: tuple[int, ...], C_out: int, C_in: int, min_width: int, max_groups: int | None) -> int:
    """How many of the levels have groups at least `min_width` channels wide on both sides, and not too many of them."""
    widest = min(C_out, C_in)
    fits = (widest // n >= min_width and (max_groups is None or n <= max_groups) for n in counts)
    return max(1, sum(fits))


def relationship_matrix(C_out: int, C_in: int, groups: int) -> NDArray[np.bool_]:
    """U: (C_out, C_in), whether an output and an input channel are in the same of `groups` equal blocks."""
    return _blocks(C_out, groups)[:, None] == _blocks(C_in, groups)[None, :]


@lru_cache(maxsize=256)
def cost_matrix(C_out: int, C_in: int, counts: tuple[int, ...], decay: float, depth: int | None = None) -> Matrix:
    """R: (C_out, C_in), what a kernel costs at each place: `decay`^k outside level k + 2 and inside level k + 1.

    0 inside the finest blocks. With `depth` g only the first g splits cost something: R_g, which pushes a layer of
    level g to level g + 1. Read-only.

    Shape example: 8 x 8, decay 1/2 has the first row 0, .25, .5, .5, 1, 1, 1, 1.
    """
    cost = np.zeros((C_out, C_in))
    last = len(counts) if depth is None else depth + 1
    for k, (coarse, fine) in enumerate(pairwise(counts[:last])):
        inside = relationship_matrix(C_out, C_in, coarse)
        cost[inside & ~relationship_matrix(C_out, C_in, fine)] = decay**k
    cost.flags.writeable = False
    return cost


def block_sums(S: Matrix, columns: NDArray[np.int64], blocks: int) -> Matrix:
    """(n, blocks): the sum of every row of S (n, m) over each of `blocks` equal blocks of its columns in this order."""
    ordered = np.take(S, columns, axis=1)
    width = S.shape[1] // blocks
    # A product sums short pieces some times faster than `sum` does.
    return ordered if width == 1 else (ordered.reshape(-1, width) @ np.ones(width)).reshape(-1, blocks)


def block_costs(sums: Matrix, counts: tuple[int, ...], decay: float) -> Matrix:
    """(n, finest): what kernels that have these sums (n, finest) over the finest blocks cost in each of those blocks.

    It is `S @ cost_matrix(n, m, ...).T` for the S (n, m) of the sums, with one column for each block, for much less: a
    level in the middle cuts the cost matrix into equal blocks, and outside of them it is constant all over a block.
    """
    finest, coarse = counts[-1], counts[len(counts) // 2]
    inner = finest // coarse
    cost = cost_matrix(finest, finest, counts, decay)
    inside = sums.reshape(-1, inner)
    found = (inside @ cost[:inner, :inner]).reshape(-1, coarse, inner)
    outside = (inside @ np.ones(inner)).reshape(-1, coarse) @ cost[::inner, ::inner]
    found += outside[:, :, None]
    return found.reshape(-1, finest)


def kept_norms(S: Matrix, counts: tuple[int, ...]) -> Matrix:
    """(levels,): the sum of S inside the blocks of every level; the first is the whole sum. They don't increase."""
    finest = counts[-1]
    C_out, C_in = S.shape
    blocks = S.reshape(finest, C_out // finest, finest, C_in // finest).sum((1, 3))
    kept: list[float] = []
    for n in counts:
        table = blocks.reshape(n, finest // n, n, finest // n)
        kept.append(float(np.einsum("iaib->", table)))
    return np.asarray(kept)


def finest_level(kept: Matrix, threshold: float, allowed: int) -> int:
    """The finest of the `allowed` levels that keeps at least 1 - `threshold` of the norm; 1 for a layer of zeros.

    At threshold 1 it is the finest allowed one of any layer. A tie counts as kept, with a tolerance of 1e-9.
    """
    if threshold >= 1:
        return allowed
    if kept[0] <= 0:
        return 1
    fits = kept[:allowed] >= (1 - threshold - 1e-9) * kept[0]
    return int(np.flatnonzero(fits)[-1]) + 1


def _blocks(channels: int, groups: int) -> NDArray[np.int64]:
    """(channels,): the block that each channel is in."""
    return np.arange(channels) // (channels // groups)
