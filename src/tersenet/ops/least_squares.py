"""Least squares with an intercept from second moments: a layer's weights refitted to the inputs that are left.

Errors are shares of the wanted outputs' variance that a fit misses, from 0 to 1; the square root is the relative
root-mean-square error. Of rows in float32, errors below about 1e-6 are rounding. Targets are the layer's whole
pre-activation outputs, its own bias included, so that the fitted intercept *is* the new bias.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1 (reconstruction).
Differs: normal equations by Cholesky instead of a singular value decomposition of all rows. The published code takes
the old bias out of the targets and then installs the intercept without adding it again. Where rows don't determine the
weights, they stay near the old ones instead of near zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.ops.gram import Moments, StatisticsError

_RIDGE = 1e-6  # of the mean variance of an input


@dataclass(frozen=True)
class Fit:
    """`weight` (O, M) and `bias` (O,) in float64; `error` as a share of the targets' variance.

    `ridge` is what was added to each input's sum of squares (0: plain least squares), and `notice` then says why.
    """

    weight: Tensor
    bias: Tensor
    error: float
    ridge: float
    notice: str | None


def channel_columns(channels: Tensor, taps: int) -> Tensor:
    """(K,) -> (K * taps,): the columns of the moments that belong to channels of `taps` values each."""
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def fit(moments: Moments, columns: Tensor | None = None, *, prior: Tensor | None = None, ridge: float = 0.0) -> Fit:
    """The weights and bias that come nearest to the targets from the inputs `columns` (M,), all when None.

    Args:
        prior: weights (O, M) that a ridge pulls to, zero when None. With the layer's own weights the error is never
            above that of leaving them as they are, and directions in which no row varies keep them.
        ridge: added to each input's sum of squares, in units of the inputs' mean. Without it, a ridge of 1e-6 is used
            only where the inputs are linearly dependent.

    Raises:
        StatisticsError: no rows.
        ValueError: a prior of another shape.
    """
    xy, mean, squares = _read(moments, columns)
    inputs = len(mean)
    start = xy.new_zeros(moments.outputs, inputs) if prior is None else prior.detach().flatten(1).to(xy)
    if start.shape != (moments.outputs, inputs):
        raise ValueError(
            f"a prior of shape {tuple(start.shape)} does not fit {moments.outputs} outputs, {inputs} inputs"
        )
    triangle, added = factor(lambda: _lower(moments, columns), moments.precision, ridge)
    wanted = torch.add(xy, start.T, alpha=added) if added else xy
    # In place: as much memory again takes a fourth of the time.
    solution = wanted.clone(memory_format=torch.contiguous_format)
    torch.linalg.solve_triangular(triangle, solution, upper=False, out=solution)
    torch.linalg.solve_triangular(triangle.mT, solution, upper=True, out=solution)
    weight = solution.T
    # Of energy - 2 <W, xy> + <W, xx W>, with xx W from the equations that the weights solve.
    after = moments.energy - float(torch.dot(solution.flatten(), xy.flatten()))
    if added:
        after += added * float((weight * (start - weight)).sum())
    bias = moments.mean_y - weight @ mean
    notice = _notice(moments, squares, added and (not ridge or moments.rows <= inputs))
    return Fit(weight, bias, _share(after, moments.energy), added, notice)


def error_of(moments: Moments, weight: Tensor, columns: Tensor | None = None) -> float:
    """The error of given weights (O, M or O, C, *kernel) on the inputs `columns` (M,), with the best bias for them."""
    xy, _, _ = _read(moments, columns)
    xx = _lower(moments, columns)
    xx = xx.tril() + xx.tril(-1).T
    columns_by_outputs = weight.detach().flatten(1).to(xx).T
    missed = moments.energy + float((columns_by_outputs * (xx @ columns_by_outputs - 2 * xy)).sum())
    return _share(missed, moments.energy)


def error_curve(moments: Moments, order: Tensor, taps: int) -> Tensor:
    """(K + 1,) float64: the error of a refit to the first 0, 1, ... K channels of `order` (K,), `taps` values each.

    One factorisation gives all: with xx = L L^T in that order and F = L^-1 xy, each channel lowers the error by the
    squares of its rows of F. Never increasing. Linearly dependent inputs get the ridge of `fit`; the curve is then that
    of the penalised objective, an upper bound.
    """
    columns = channel_columns(order, taps)
    xy, _, _ = _read(moments, columns)
    triangle, _ = factor(lambda: _lower(moments, columns), moments.precision)
    gains = torch.linalg.solve_triangular(triangle, xy, upper=False).square().sum(1)
    explained = torch.cat([gains.new_zeros(1), gains.view(len(order), taps).sum(1).cumsum(0)])
    energy = moments.energy
    return ((energy - explained) / energy).clamp(min=0) if energy > 0 else torch.zeros_like(explained)


def factor(made: Callable[[], Tensor], precision: float, ridge: float = 0.0) -> tuple[Tensor, float]:
    """Lower triangle L with L L^T = xx + added * I, and what was added.

    `made` gives xx (M, M) in memory that becomes L's, anew each time; only its lower triangle is read. It is a sum of
    squares and products of machine epsilon `precision`; `ridge` is in units of its mean diagonal element. Without one,
    1e-6 is used where a column is linearly dependent on those before it as far as `precision` can tell, and more where
    that does not suffice.
    """
    triangle = made()
    diagonal = triangle.diagonal().clone()
    size = float(diagonal.mean()) or 1.0
    if not ridge:
        failed = _factor_in_place(triangle)
        # What of each column is not explained by those before it.
        own = triangle.diagonal().square() / diagonal
        rounding = max(precision, len(triangle) * torch.finfo(torch.float64).eps)
        if not failed and float(own.min()) > 8 * rounding:
            return triangle, 0.0
        ridge, triangle = _RIDGE, made()
    while True:
        triangle.diagonal().add_(ridge * size)
        if not _factor_in_place(triangle):
            return triangle, ridge * size
        ridge, triangle = 10 * ridge, made()


def _factor_in_place(xx: Tensor) -> bool:
    """Whether that failed. In LAPACK's order of columns the lower triangle is the upper one."""
    failed = torch.zeros((), dtype=torch.int32, device=xx.device)
    torch.linalg.cholesky_ex(xx.mT, upper=True, out=(xx.mT, failed))
    return bool(failed)


def _read(moments: Moments, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`xy`, the means and the sums of squares of the inputs `columns`, all when None."""
    if not moments.rows:
        raise StatisticsError(f"{moments.name!r} has seen no calibration data: give at least one image.")
    found = moments.xy, moments.mean_x, moments.lower.diagonal()
    if columns is None:
        return found
    xy, mean, squares = (each[columns.to(each.device)] for each in found)
    return xy, mean, squares


def _lower(moments: Moments, columns: Tensor | None) -> Tensor:
    """A copy of `xx` on and below the diagonal for the inputs `columns`."""
    if columns is None:
        return moments.lower.clone(memory_format=torch.contiguous_format)
    columns = columns.to(moments.lower.device)
    ascending = bool((columns[1:] > columns[:-1]).all())
    xx = moments.lower if ascending else moments.xx
    return xx[columns[:, None], columns]


def _share(missed: float, energy: float) -> float:
    """Differences of large numbers can end a little below zero. Constant targets are met by the bias."""
    return max(missed, 0.0) / energy if energy > 0 else 0.0


def _notice(moments: Moments, squares: Tensor, dependent: bool | float) -> str | None:
    name, inputs = moments.name, len(squares)
    if not moments.energy:
        return (
            f"{name!r}: its target outputs are constant over all {moments.rows} calibration rows; the bias meets them."
        )
    if not dependent:
        return None
    if not bool(squares.any()):
        return f"{name!r}: its inputs are constant over all {moments.rows} calibration rows; only the bias is fitted."
    kept = "what the rows don't determine stays as it was (ridge)"
    if moments.rows <= inputs:
        return (
            f"{name!r}: {moments.rows} calibration rows can't determine {inputs} weights per output; {kept}. At least "
            f"{inputs + 1} rows are needed, and {4 * inputs} are better: use more images, or more positions each."
        )
    return f"{name!r}: some inputs are constant or linearly dependent over all {moments.rows} calibration rows; {kept}."
