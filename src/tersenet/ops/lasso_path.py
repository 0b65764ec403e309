"""Which input channels a layer needs: the whole LASSO path over channel contributions, from second moments alone.

Channel i contributes Z_i = X_i W_i^T to the layer's outputs. The path of

    min over b of 1/2 ||Y - sum_i b_i Z_i||^2 + penalty * sum_i |b_i|        (Y and Z_i centred per output)

is followed exactly, knot by knot, on the Gram matrix of the Z_i, so every number of channels is met exactly.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1; Osborne,
Presnell, Turlach, A New Approach to Variable Selection in Least Squares Problems, 2000 (the homotopy); Efron et al.,
Least Angle Regression, 2004.
Differs: the published code expands 400 rows and searches the penalty by repeated coordinate descent with one intercept
for all outputs, until up to a tenth more channels than asked are left. Here all rows count, each output has its own
intercept, and the number is exact.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersenet.ops.contributions import Contributions

_NOTHING = 1e-12  # rounding of float64, in units of the first penalty
_SIGNS = np.array([[1.0], [-1.0]])  # of a channel's correlation where it joins
_DEPENDENT = 1e-10  # a channel whose contribution has a smaller share outside the active ones' span adds nothing


class LassoPath:
    """Exact solutions for every number of channels k from 0 to C, each followed to where it is first asked for.

    Where the LASSO never has k channels (some are dead, or others can stand in for them), channels with the largest
    contribution fill up, at penalty 0 with coefficient 0.
    """

    def __init__(self, gram: NDArray[np.float64], target: NDArray[np.float64], precision: float) -> None:
        """The path over contributions with `gram` (C, C), towards `target` (C,), which are as exact as `precision`."""
        self.channels = len(target)
        # To penalties and coefficients near one, so that tolerances are relative.
        self._size, self._pull = float(np.diag(gram).mean()) or 1.0, float(np.abs(target).max(initial=0)) or 1.0
        self._homotopy = _Homotopy(gram / self._size, target / self._pull, precision)
        self._squares = np.diag(gram).copy()
        self._filled = False

    @property
    def supports(self) -> Tensor:
        """(C + 1, C) bool: row k has exactly k channels."""
        return torch.from_numpy(self._followed().supports)

    @property
    def penalties(self) -> Tensor:
        """(C + 1,): a penalty at which each support is the LASSO's; of channels that tie, some can be 0 there."""
        return torch.from_numpy(self._followed().penalties * self._pull)

    @property
    def scales(self) -> Tensor:
        """(C + 1, C): the LASSO's coefficients at these penalties."""
        return torch.from_numpy(self._followed().scales * (self._pull / self._size))

    def kept(self, count: int) -> Tensor:
        """(count,) int64, ascending: the LASSO's choice of exactly `count` channels.

        Raises:
            ValueError: fewer than 0 or more than C channels.
        """
        if not 0 <= count <= self.channels:
            raise ValueError(f"can't keep {count} of {self.channels} channels")
        return torch.from_numpy(np.flatnonzero(self._followed(count).supports[count]))

    @property
    def order(self) -> Tensor:
        """(C,) int64: all channels, those that are in most of the supports first.

        The LASSO drops channels now and then, so its supports are not quite nested. One order for all numbers of
        channels is needed for the error of every number from one factorisation.
        """
        return torch.sort(self.supports.sum(0), descending=True, stable=True).indices

    def _followed(self, count: int | None = None) -> _Homotopy:
        """With the support of `count` channels, or with all of them."""
        homotopy = self._homotopy
        if homotopy.follow(count) and not self._filled:
            self._filled = True
            own = np.where(homotopy.dead, 0, self._squares)
            last = homotopy.supports[homotopy.size]
            filling = np.argsort(-np.where(last, np.inf, own), kind="stable")
            for missing in np.flatnonzero(~homotopy.reached):
                homotopy.supports[missing] = False
                homotopy.supports[missing, filling[:missing]] = True
        return homotopy


def lasso_path(parts: Contributions) -> LassoPath:
    """The whole path. Deterministic: of channels that tie, the one with the lowest index comes first."""
    return LassoPath(parts.gram.cpu().numpy(), parts.target.cpu().numpy(), parts.precision)


class _Homotopy:
    """The path from the penalty where the first channel joins down to 0.

    Between two knots the active coefficients move along a straight line, on which the correlations of all active
    channels with the residual stay equal to the penalty. `inverse` is that of the active channels' Gram matrix and
    `rows` are their rows of the full one, both in the order of `members`.
    """

    def __init__(self, gram: NDArray[np.float64], target: NDArray[np.float64], precision: float) -> None:
        channels = len(target)
        # Behind what rounding leaves channels would go on joining and leaving, to and fro.
        self.nothing, self.dependent = max(_NOTHING, 8 * precision), max(_DEPENDENT, 8 * precision)
        self.gram, self.correlation = gram, target.copy()
        self.size, self._members = 0, np.zeros(channels, dtype=np.int64)
        self.signs, self.values = np.zeros(channels), np.zeros(channels)
        self.inverse, self.rows = np.zeros((channels, channels)), np.zeros((channels, channels))
        self.reached = np.zeros(channels + 1, dtype=bool)
        self.supports = np.zeros((channels + 1, channels), dtype=bool)
        self.penalties, self.scales = np.zeros(channels + 1), np.zeros((channels + 1, channels))
        # How things move while the members stay.
        self._line: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        # Who can't join: the dead ever; members and their linear combinations until one leaves.
        self.dead, self.parked = np.diag(gram) <= 1e-14, np.zeros(channels, dtype=bool)

        strength = np.where(self.dead, 0, np.abs(target))
        self.penalty = float(strength.max(initial=0))
        # Every knot adds or drops a channel; the bound is for exact ties, among which it could go round in circles.
        self._left = 20 * channels if self.penalty else 0
        if self.penalty:
            self.reached[0], self.penalties[0] = True, self.penalty
            self._join(int(np.argmax(strength)))

    @property
    def members(self) -> NDArray[np.int64]:
        """Channels in the order in which the matrices have them."""
        return self._members[: self.size]

    def follow(self, count: int | None) -> bool:
        """Go on until nothing can change at `count` channels any more, or to the end; whether it is the end."""
        while self._left and (count is None or not self.penalties[count]):
            self._left -= 1
            moves, fall = self._line = self._line or self._direction()
            step, joining, leaving = self._next_knot(self.penalty, moves, fall)
            self._record(self.penalty, step, moves)
            self.values[: len(moves)] += step * moves
            self.correlation -= step * fall
            self.penalty -= step
            if self.penalty <= self.nothing:
                self._left = 0
                break
            if leaving is not None:
                self._leave(leaving)
            if joining is not None:
                self._join(joining)
        return not self._left

    def _direction(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How the active coefficients and all correlations change while the penalty falls by one."""
        size = self.size
        signs, inverse, rows = self.signs[:size], self.inverse[:size, :size], self.rows[:size]
        moves = inverse @ signs
        fall = moves @ rows
        error = signs - fall[self.members]
        if np.abs(error).max(initial=0) > 1e-9:
            # Updates of the inverse have lost digits: start afresh.
            inverse[:] = np.linalg.inv(rows[:, self.members])
            moves = inverse @ signs
            moves += inverse @ (signs - (moves @ rows)[self.members])
            fall = moves @ rows
        return moves, fall

    def _next_knot(
        self, penalty: float, moves: NDArray[np.float64], fall: NDArray[np.float64]
    ) -> tuple[float, int | None, int | None]:
        """How far the penalty falls until a channel joins or a member (by its place) leaves, or it is 0."""
        step, joining, leaving = penalty, None, None
        # A channel that moves with the members never meets the penalty; one that just left moves away from it.
        rate = 1 - _SIGNS * fall
        gap = np.maximum(penalty - _SIGNS * self.correlation, 0)
        gap[:, self.dead | self.parked] = np.inf
        gap[rate <= 1e-10] = np.inf
        when = gap / np.maximum(rate, 1e-10)
        first = int(when.argmin())
        if when.flat[first] < step:
            step, joining = float(when.flat[first]), first % len(fall)
        size = len(moves)
        shrinks = moves * self.signs[:size] < 0
        when = np.divide(np.abs(self.values[:size]), np.abs(moves), out=np.full(size, np.inf), where=shrinks)
        if size and when.min() <= step:
            leaving = int(np.argmin(when))
            step, joining = float(when[leaving]), None
        return step, joining, leaving

    def _record(self, penalty: float, step: float, moves: NDArray[np.float64]) -> None:
        """Keep the middle of the first stretch with this many members; one of no length only for want of another."""
        size = len(moves)
        if self.reached[size] and (step <= _NOTHING or self.penalties[size] > 0):
            return
        self.reached[size] = True
        self.supports[size] = False
        self.supports[size, self.members] = True
        if step > _NOTHING:
            self.penalties[size] = penalty - step / 2
            self.scales[size, self.members] = self.values[:size] + step / 2 * moves

    def _join(self, channel: int) -> None:
        size = self.size
        inverse, column = self.inverse[:size, :size], self.gram[self.members, channel]
        through = inverse @ column
        rest = self.gram[channel, channel] - float(through @ column)
        self.parked[channel] = True
        if rest <= self.dependent * self.gram[channel, channel]:
            return
        self._line = None
        _add_outer(inverse, through, through / rest)
        self.inverse[size, :size] = self.inverse[:size, size] = -through / rest
        self.inverse[size, size] = 1 / rest
        self.rows[size], self.values[size] = self.gram[channel], 0.0
        self.signs[size] = 1.0 if self.correlation[channel] > 0 else -1.0
        self._members[size] = channel
        self.size += 1

    def _leave(self, place: int) -> None:
        """The last member takes the place."""
        self._line = None
        last = self.size - 1
        self._members[place] = self._members[last]
        self.size = last
        for matrix in (self.inverse, self.inverse.T, self.rows):
            matrix[[place, last]] = matrix[[last, place]]
        for vector in (self.values, self.signs):
            vector[place] = vector[last]
        column = self.inverse[:last, last]
        _add_outer(self.inverse[:last, :last], column, -column / self.inverse[last, last])
        self.parked[:] = False
        self.parked[self.members] = True


def _add_outer(matrix: NDArray[np.float64], column: NDArray[np.float64], row: NDArray[np.float64]) -> None:
    """In parts that stay in the cache: a whole outer product would be as large as the matrix."""
    part = 1 + 32_768 // (len(row) + 1)
    for start in range(0, len(column), part):
        matrix[start : start + part] += column[start : start + part, None] * row
