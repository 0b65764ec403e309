"""Layers split in two of lower rank: spatially (k x k as k x 1 and 1 x k) or over channels (k x k as k x k and 1 x 1).

Source: Jaderberg et al., Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014 (spatial);
Zhang et al., Accelerating Very Deep Convolutional Networks for Classification and Detection, TPAMI 2016, section 3
(channels). The fit that knows of the ReLU is in `relu_fit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.ops.gram import Moments
from tersenet.ops.relu_fit import whitener


@dataclass(frozen=True)
class SpatialDecomposition:
    """All ranks of one weight: singular vectors `left` (C * kh, R), `right` (R, O * kw), singular values (R,)."""

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, int, int, int]

    @property
    def errors(self) -> Tensor:
        """(R + 1,) float64: squared error of the weight at rank 0, 1, ... R, as a share of the weight's own square."""
        squares = self.values.square()
        tails = torch.cat([squares, squares.new_zeros(1)]).flip(0).cumsum(0).flip(0)
        return tails / tails[0] if float(tails[0]) > 0 else tails

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """Vertical (rank, C, kh, 1) and horizontal (O, rank, 1, kw) weights, float64; all scale is in the second.

        The vertical convolution has stride (sh, 1), padding (ph, 0), dilation (dh, 1) and no bias, the horizontal one
        (1, sw), (0, pw), (1, dw) and the bias.

        Raises:
            ValueError: a rank below 1 or above min(C * kh, O * kw).
        """
        outputs, channels, height, width = self.shape
        _check_rank(rank, len(self.values))
        vertical = self.left[:, :rank].T.reshape(rank, channels, height, 1)
        scaled = self.values[:rank, None] * self.right[:rank]
        horizontal = scaled.view(rank, outputs, width).transpose(0, 1).reshape(outputs, rank, 1, width)
        return vertical.contiguous(), horizontal.contiguous()


def spatial_decomposition(weight: Tensor) -> SpatialDecomposition:
    """Singular value decomposition of a weight (O, C, kh, kw) as a matrix with rows (C, kh) and columns (O, kw).

    At every rank the nearest product of a vertical and a horizontal convolution. The outputs come nearer still when the
    horizontal one is refitted (`least_squares.fit` or `relu_fit`) to what the vertical one puts out.

    Raises:
        ValueError: not the weight of an ungrouped 2-D convolution.
    """
    if weight.dim() != 4:
        raise ValueError(f"a spatial decomposition takes a weight (O, C, kh, kw), not {tuple(weight.shape)}")
    outputs, channels, height, width = weight.shape
    matrix = weight.detach().double().permute(1, 2, 0, 3).reshape(channels * height, outputs * width)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return SpatialDecomposition(left, values, right, (outputs, channels, height, width))


def composed(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """(R, C, kh, 1), (O, R, 1, kw) -> (O, C, kh, kw): the one weight with the same outputs."""
    return torch.einsum("rch,orw->ochw", vertical[..., 0], horizontal[:, :, 0])


@dataclass(frozen=True)
class ReducedRank:
    """All ranks of the map from current responses to wanted ones: `left` (O, R), `right` (R, O) of orthonormal rows.

    `errors` (R + 1,) float64 are shares of the wanted responses' variance missed at rank 0, 1, ... R.
    """

    left: Tensor
    right: Tensor
    errors: Tensor
    mean_x: Tensor
    mean_y: Tensor

    def fit(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """`left` (O, rank), `right` (rank, O) and intercept (O,): wanted ~ current @ left @ right + intercept.

        Raises:
            ValueError: a rank below 1 or above R.
        """
        _check_rank(rank, len(self.right))
        left, right = self.left[:, :rank], self.right[:rank]
        return left, right, self.mean_y - self.mean_x @ left @ right


def reduced_rank(moments: Moments) -> ReducedRank:
    """Reduced-rank regression of wanted responses `y` on a layer's current responses `x`, for every rank at once.

    With A^T xx A = I and B = A^T xy = P S Q^T, the best map of rank r is A P_r S_r Q_r^T, and it misses the squares of
    the singular values from r + 1 on beside what no linear map reaches.

    Source: Zhang et al. 2016, section 3.2 (the generalised singular value decomposition, asymmetric).
    Differs: from the (O, O) moments instead of a decomposition of all rows. Responses that are linearly dependent are
    left out of the inverse.
    """
    basis = whitener(moments.xx, moments.precision)
    inner, values, right = torch.linalg.svd(basis.T @ moments.xy, full_matrices=False)
    explained = torch.cat([values.new_zeros(1), values.square().cumsum(0)])
    energy = moments.energy
    errors = ((energy - explained) / energy).clamp(min=0) if energy > 0 else torch.zeros_like(explained)
    return ReducedRank(basis @ (inner * values), right, errors, moments.mean_x, moments.mean_y)


def channel_pair(
    weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, intercept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer whose responses go through `left` (O, R), `right` (R, O) and `intercept` (O,), as two layers.

    Returns the first layer's weight (R, C, *kernel), which has no bias, and the second's weight (O, R, 1, ...) and bias
    (O,). The responses that were fitted held `bias`, so it goes through the map too.

    Differs: the published code adds the old bias as it is.
    """
    left, right = left.to(weight), right.to(weight)
    first = torch.tensordot(left.T, weight, 1)
    second = right.T.reshape(len(weight), -1, *[1] * (weight.dim() - 2)).contiguous()
    through = intercept.to(weight)
    return first, second, through if bias is None else through + bias @ left @ right


def merge_pointwise(
    weight: Tensor, bias: Tensor | None, pointwise: Tensor, pointwise_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A layer (M, C, *kernel) and the 1 x 1 layer (O, M, 1, ...) behind it as one (O, C, *kernel), with its bias.

    Source: He et al. 2017, the combination step of their 3C.
    """
    matrix = pointwise.flatten(1)
    merged = torch.tensordot(matrix, weight, 1)
    if bias is None:
        return merged, pointwise_bias
    through = matrix @ bias
    return merged, through if pointwise_bias is None else through + pointwise_bias


def merging_pays(weight: Tensor, pointwise: Tensor) -> bool:
    """Whether one layer costs no more multiply-adds per output position than a layer and the 1 x 1 layer behind it.

    For a square 1 x k layer of M channels this is k * M >= (k - 1) * O.
    """
    per_output = weight[0].numel()
    return len(pointwise) * per_output <= len(weight) * (per_output + len(pointwise))


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"the rank must be from 1 to {most}, not {rank}")
