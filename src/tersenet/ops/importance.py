"""How much a filter or channel matters, and how such scores are made comparable between layers.

The first functions give one score per filter or channel; low scores are pruned first. `(C, K)` is one filter per row,
`(C, M)` all values of one channel per row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def l2(filters: Tensor) -> Tensor:
    """(C, K) -> (C,): Euclidean norm. Source: Soft Filter Pruning, He et al. 2018."""
    return torch.linalg.vector_norm(filters, dim=1)


def l1(filters: Tensor) -> Tensor:
    """(C, K) -> (C,): sum of absolute values. Source: Li et al., Pruning Filters for Efficient ConvNets."""
    return filters.abs().sum(1)


def fpgm(filters: Tensor) -> Tensor:
    """(C, K) -> (C,): sum of distances to all other filters; the geometric median's neighbours are redundant.

    Source: He et al., Filter Pruning via Geometric Median, CVPR 2019.
    """
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def taylor(filters: Tensor, gradients: Tensor) -> Tensor:
    """(C, K), (C, K) -> (C,): sum of |weight * gradient|, to first order what the loss changes without each weight.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019.
    Differs: absolute values instead of squares, so that the scores are in units of the loss.
    """
    return (filters * gradients).abs().sum(1)


def activation(values: Tensor) -> Tensor:
    """(C, M) -> (C,): mean absolute activation."""
    return values.abs().mean(1)


def apoz(values: Tensor) -> Tensor:
    """(C, M) -> (C,): share of activations that are not zero, which is 1 - APoZ.

    Source: Hu et al., Network Trimming, arXiv 1607.03250 (average percentage of zeros behind ReLU).
    """
    return values.ne(0).float().mean(1)


def by_mean(scores: Tensor) -> Tensor:
    """(C,) -> (C,) with mean 1."""
    return scores / _not_zero(scores.mean())


def by_max(scores: Tensor) -> Tensor:
    """(C,) -> (C,) with maximum 1."""
    return scores / _not_zero(scores.max())


def lamp(scores: Tensor) -> Tensor:
    """(C,) -> (C,): each score's square as a share of the squares of all scores that are not smaller.

    The last channel of every layer has 1, the highest value there is, so no layer is emptied before all others.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    Differs: the published score is of single weights; here of channels.
    """
    squares, order = scores.square().sort(stable=True)
    shares = squares / _not_zero(squares.flip(0).cumsum(0).flip(0))
    return torch.empty_like(shares).index_copy_(0, order, shares)


def _not_zero(value: Tensor) -> Tensor:
    return torch.where(value == 0, 1, value)


FILTER_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "l2": l2, "fpgm": fpgm}
ACTIVATION_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"activation": activation, "apoz": apoz}
NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": by_mean,
    "max": by_max,
    "lamp": lamp,
    "none": torch.clone,
}
