"""How much a filter matters. Every function takes a matrix with one filter per row and gives one score per row.

Low scores are pruned first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def l2(filters: Tensor) -> Tensor:
    """(C_out, K) -> (C_out,): Euclidean norm. Source: Soft Filter Pruning, He et al. 2018."""
    return torch.linalg.vector_norm(filters, dim=1)


def l1(filters: Tensor) -> Tensor:
    """(C_out, K) -> (C_out,): sum of absolute values. Source: Li et al., Pruning Filters for Efficient ConvNets."""
    return filters.abs().sum(1)


def fpgm(filters: Tensor) -> Tensor:
    """(C_out, K) -> (C_out,): sum of distances to all other filters; the geometric median's neighbours are redundant.

    Source: He et al., Filter Pruning via Geometric Median, CVPR 2019.
    """
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


FILTER_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "l2": l2, "fpgm": fpgm}
