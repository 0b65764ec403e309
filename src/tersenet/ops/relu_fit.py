"""Linear fits that only have to be right behind the ReLU: where the target is below zero, anything below will do.

Source: Zhang et al., Accelerating Very Deep Convolutional Networks for Classification and Detection, TPAMI 2016,
section 3.3; He et al., Channel Pruning, ICCV 2017 (the schedule, and its use behind a spatial decomposition).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.ops.gram import Moments, StatisticsError, require_finite

SCHEDULE = ((0.1, 30), (1.0, 20))  # (weight of the coupling, iterations), as published
_ROWS = 1024  # rows handled at once


@dataclass(frozen=True)
class ReluFit:
    """Wanted outputs ~ x @ left @ right + bias behind a ReLU; `left` (D, R), `right` (R, O), `bias` (O,), float64.

    Without a rank, `right` is the identity. `error` is the share of the variance of ReLU(wanted) that is missed,
    `linear_error` that of the linear fit it started from. `objectives` are those of `relu_step`, summed over all rows
    and outputs in units of that variance, after each iteration.
    """

    left: Tensor
    right: Tensor
    bias: Tensor
    error: float
    linear_error: float
    objectives: tuple[float, ...]

    @property
    def weight(self) -> Tensor:
        """(O, D)."""
        return (self.left @ self.right).T


def relu_step(prediction: Tensor, wanted: Tensor, coupling: float) -> Tensor:
    """Elementwise argmin over u of (ReLU(u) - wanted)^2 + coupling * (u - prediction)^2, for wanted >= 0.

    Source: Zhang et al. 2016, equations 10 and 11.
    """
    below = prediction.clamp(max=0)
    above = ((coupling * prediction + wanted) / (coupling + 1)).clamp(min=0)
    cost_below = wanted.square() + coupling * (below - prediction).square()
    cost_above = (above - wanted).square() + coupling * (above - prediction).square()
    return torch.where(cost_below < cost_above, below, above)


def relu_fit(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    prior: Tensor | None = None,
    rank: int | None = None,
    ridge: float = 0.0,
    schedule: Sequence[tuple[float, int]] = SCHEDULE,
) -> ReluFit:
    """Fit ReLU(x W^T + b) to ReLU(y) by turns: u near both (`relu_step`), then W and b by least squares on u.

    Starts from the linear least squares fit, and returns the best of all iterations, so it is never worse than that. A
    ridge is in all of them.

    Args:
        name: of the layer, for messages.
        x: (N, D) inputs from the compressed network.
        y: (N, O) whole pre-activation outputs of the original network, its bias included.
        prior: (O, D) weights that are kept in directions in which no row varies; zero when None.
        rank: of W, at most; full when None. Not together with a prior.
        ridge: pull to the prior, in units of the inputs' mean sum of squares; needs one.
        schedule: pairs of coupling and number of iterations.

    Raises:
        StatisticsError: no rows, or a NaN or infinite value.
        ValueError: rows of unequal number, a prior and a rank, a rank below 1, a ridge without a prior.

    Differs: the published code takes the bias out of the wanted outputs, which moves the ReLU's threshold, and
    decomposes all rows anew in each iteration. Here they are whitened once, and an iteration is two matrix products.
    """
    if len(x) != len(y) or (rank is not None and (rank < 1 or prior is not None)) or (ridge and prior is None):
        raise ValueError(f"{name!r}: {len(x)} and {len(y)} rows, rank {rank}, prior {prior is not None}")
    if not len(x):
        raise StatisticsError(f"{name!r} has seen no calibration data: give at least one image.")
    require_finite(name, x, y)
    moments = Moments(name, x.shape[1], y.shape[1])
    moments.add(x, y)
    added = ridge * float(moments.xx.diagonal().mean())
    basis = whitener(moments.xx + added * torch.eye(moments.inputs).to(moments.xx), moments.precision)
    rows = _Rows(x, y, moments.mean_x, basis)
    pull = 0.0 if prior is None else added * basis.T @ prior.detach().flatten(1).to(basis).T
    coefficients, intercept = truncated(basis.T @ moments.xy + pull, rank), moments.mean_y
    best, errors, objectives = (coefficients, intercept), list[float](), list[float]()
    for coupling in [coupling for coupling, count in schedule for _ in range(count)]:
        turn = rows.turn(coefficients, intercept, coupling)
        errors.append(turn.error)
        objectives.append(turn.objective)
        if turn.error == min(errors):
            best = coefficients, intercept
        coefficients, intercept = truncated(turn.coefficients + pull, rank), turn.intercept
    errors.append(rows.turn(coefficients, intercept, 1.0).error)
    if errors[-1] == min(errors):
        best = coefficients, intercept
    left, right = basis @ best[0], torch.eye(y.shape[1]).to(basis)
    if rank is not None:
        inner, values, right = torch.linalg.svd(best[0], full_matrices=False)
        left, right = basis @ (inner * values)[:, :rank], right[:rank]
    elif prior is not None and basis.shape[1] < len(basis):
        kept = prior.detach().flatten(1).to(basis).T
        left += kept - basis @ (basis.T @ (moments.xx @ kept + added * kept))
    bias = best[1] - moments.mean_x @ left @ right
    return ReluFit(left, right, bias, min(errors), errors[0], tuple(objectives))


@dataclass(frozen=True)
class _Turn:
    """`error` and `objective` of a fit, and the least squares fit to what `relu_step` makes of it."""

    error: float
    objective: float
    coefficients: Tensor
    intercept: Tensor


class _Rows:
    """Inputs as orthonormal columns, so that least squares is one product with them; wanted outputs behind the ReLU."""

    def __init__(self, x: Tensor, y: Tensor, mean: Tensor, basis: Tensor) -> None:
        kind = torch.promote_types(x.dtype, torch.float32)
        centre, whitening = mean.to(kind), basis.to(kind)
        self.inputs = torch.cat([(part.to(kind) - centre) @ whitening for part in x.detach().split(_ROWS)])
        self.wanted = [part.to(kind).relu() for part in y.detach().split(_ROWS)]
        average = torch.stack([part.sum(0, dtype=torch.float64) for part in self.wanted]).sum(0) / len(y)
        self.variance = sum(float((part - average).square().sum()) for part in self.wanted) or 1.0

    def turn(self, coefficients: Tensor, intercept: Tensor, coupling: float) -> _Turn:
        error, objective = 0.0, 0.0
        fitted, total = torch.zeros_like(coefficients), torch.zeros_like(intercept)
        map_, shift = coefficients.to(self.inputs), intercept.to(self.inputs)
        for rows, wanted in zip(self.inputs.split(_ROWS), self.wanted, strict=True):
            prediction = rows @ map_ + shift
            error += float((prediction.relu() - wanted).square().sum(dtype=torch.float64))
            between = relu_step(prediction, wanted, coupling)
            cost = (between.relu() - wanted).square() + coupling * (between - prediction).square()
            objective += float(cost.sum(dtype=torch.float64))
            fitted += rows.T @ between
            total += between.sum(0, dtype=torch.float64)
        return _Turn(error / self.variance, objective / self.variance, fitted, total / len(self.inputs))


def whitener(xx: Tensor, precision: float) -> Tensor:
    """(D, D) -> (D, M): A with A^T xx A = I; M < D where columns are dependent as far as `precision` can tell."""
    values, vectors = torch.linalg.eigh(xx)
    used = values > 8 * max(precision, len(xx) * torch.finfo(xx.dtype).eps) * values[-1].clamp(min=0)
    return vectors[:, used] / values[used].sqrt()


def truncated(matrix: Tensor, rank: int | None) -> Tensor:
    """The nearest (M, O) matrix of that rank."""
    if rank is None or rank >= min(matrix.shape):
        return matrix
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]
    return matrix @ vectors @ vectors.T
