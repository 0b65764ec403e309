"""Streamed second moments of a layer's inputs and wanted outputs: all that selection and reconstruction need.

One row is what one output position reads, `(channels * kernel height * kernel width)` values with the channel slowest,
as in a convolution's weight (`rows.py` makes them); the row's target is the output wanted there. Memory does not depend
on the number of rows.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.
Differs: the published code keeps all rows in memory.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from tersenet.errors import TersenetError

_ROWS = 2048  # rows per matrix product
_TILE = 256  # columns per tile of the symmetric product: tiles above the diagonal are not computed


class StatisticsError(TersenetError):
    """Activations from which nothing can be computed; the message names the layer."""


class Moments:
    """Count, means and centred second moments of input rows `x` (N, D) and target rows `y` (N, O).

    `xx` (D, D), `xy` (D, O), `yy` (O, O) are sums over rows of products of deviations from the mean (not divided by N),
    in float64 on the device of the rows. Matrix products are made in the precision of the first rows added, at least
    float32, over centred blocks; `precision` is that type's machine epsilon. Blocks have a fixed number of rows, so
    one stream gives the same bits in whatever chunks it arrives.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        """`name` of the layer appears in every message about these moments."""
        if inputs < 1 or outputs < 1:
            raise ValueError(f"moments of {name!r} need at least one input and output, not {inputs} and {outputs}")
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.precision = 0.0
        self._absorbed = self._pending = 0
        self._mirrored = True
        # One row more than a block: it carries the distance between the block's mean and the mean so far.
        self._x, self._y = torch.empty(0), torch.empty(0)
        self._place(torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        zeros = torch.zeros
        self._mean_x = zeros(self.inputs, dtype=torch.float64, device=device)
        self._mean_y = zeros(self.outputs, dtype=torch.float64, device=device)
        self._xx = zeros(self.inputs, self.inputs, dtype=torch.float64, device=device)
        self._xy = zeros(self.inputs, self.outputs, dtype=torch.float64, device=device)
        self._yy = zeros(self.outputs, self.outputs, dtype=torch.float64, device=device)

    @property
    def rows(self) -> int:
        """How many rows were added."""
        return self._absorbed + self._pending

    @property
    def mean_x(self) -> Tensor:
        """(D,), float64."""
        self._absorb()
        return self._mean_x

    @property
    def mean_y(self) -> Tensor:
        """(O,), float64."""
        self._absorb()
        return self._mean_y

    @property
    def xx(self) -> Tensor:
        """(D, D), float64; not a copy."""
        self._absorb()
        if not self._mirrored:
            for start in range(_TILE, self.inputs, _TILE):
                rows = self._xx[start : start + _TILE]
                self._xx[:start, start : start + _TILE] = rows[:, :start].T
            self._mirrored = True
        return self._xx

    @property
    def xy(self) -> Tensor:
        """(D, O), float64; not a copy."""
        self._absorb()
        return self._xy

    @property
    def yy(self) -> Tensor:
        """(O, O), float64; not a copy."""
        self._absorb()
        return self._yy

    @property
    def energy(self) -> float:
        """The targets' sum of squared deviations from their means, over all rows and outputs."""
        return float(self.yy.trace())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows `x` (N, D) and `y` (N, O).

        Raises:
            StatisticsError: a value is NaN or infinite; nothing was taken in.
            ValueError: rows of another shape.
        """
        if x.shape != (len(y), self.inputs) or y.shape != (len(x), self.outputs):
            raise ValueError(
                f"{self.name!r} takes rows of {self.inputs} and {self.outputs} values, "
                f"not {tuple(x.shape)} and {tuple(y.shape)}"
            )
        require_finite(self.name, x, y)
        x, y = x.detach(), y.detach()
        if not self.rows and len(x):
            self._start(x)
        done = 0
        while done < len(x):
            taken = min(_ROWS - self._pending, len(x) - done)
            self._x[self._pending : self._pending + taken] = x[done : done + taken]
            self._y[self._pending : self._pending + taken] = y[done : done + taken]
            done += taken
            self._pending += taken
            if self._pending == _ROWS:
                self._absorb()

    def of_outputs(self, chosen: Tensor) -> Moments:
        """The same inputs with only the outputs `chosen` (O,) bool, to be read and not added to: `xx` is shared."""
        if bool(chosen.all()):
            return self
        whole = self.xx  # with all rows, and mirrored, before anything is copied
        part = copy.copy(self)
        part._xx, part._xy, part._yy = whole, self.xy[:, chosen], self.yy[chosen][:, chosen]
        part._mean_y, part.outputs = self.mean_y[chosen], int(chosen.sum())
        part._x, part._y = torch.empty(0), torch.empty(0)
        return part

    def _start(self, x: Tensor) -> None:
        kind = torch.promote_types(x.dtype, torch.float32)
        self.precision = torch.finfo(kind).eps
        self._x = torch.empty(_ROWS + 1, self.inputs, dtype=kind, device=x.device)
        self._y = torch.empty(_ROWS + 1, self.outputs, dtype=kind, device=x.device)
        if self._xx.device != x.device:
            self._place(x.device)

    def _absorb(self) -> None:
        """Move the buffered rows into the sums.

        Products are made of deviations from the block's own mean. What that leaves out, the outer product of the
        distance of the two means, comes in as one more row.
        """
        new, old = self._pending, self._absorbed
        if not new:
            return
        for block, mean in ((self._x, self._mean_x), (self._y, self._mean_y)):
            own = torch.zeros_like(mean)
            for _ in range(2):  # the second time, what rounding has left of a mean far from zero
                rest = block[:new].mean(0)
                block[:new] -= rest
                own += rest
            block[new] = (own - mean) * math.sqrt(old * new / (old + new))
            mean += (own - mean) * (new / (old + new))
        x, y = self._x[: new + 1], self._y[: new + 1]
        for start in range(0, self.inputs, _TILE):
            end = start + _TILE
            self._xx[start:end, :end] += x[:, start:end].T @ x[:, :end]
        self._xy += x.T @ y
        self._yy += y.T @ y
        self._mirrored = self.inputs <= _TILE
        self._absorbed, self._pending = old + new, 0
        self._forget_rounding()

    def _forget_rounding(self) -> None:
        """Constants have moments 0, not those of their rounding errors, which would be divided by like data."""
        still_x = self._xx.diagonal() <= self._absorbed * (16 * self.precision * self._mean_x).square()
        still_y = self._yy.diagonal() <= self._absorbed * (16 * self.precision * self._mean_y).square()
        for matrix, rows, columns in (
            (self._xx, still_x, still_x),
            (self._xy, still_x, still_y),
            (self._yy, still_y, still_y),
        ):
            if bool(rows.any()):
                matrix[rows] = 0
            if bool(columns.any()):
                matrix[:, columns] = 0

    def merge(self, other: Moments) -> None:
        """Take in all rows of `other`, which stays as it is: equal to one pass over both streams, up to rounding.

        Raises:
            ValueError: another number of inputs or outputs.
        """
        if (self.inputs, self.outputs) != (other.inputs, other.outputs):
            raise ValueError(
                f"moments of {self.name!r} ({self.inputs} inputs, {self.outputs} outputs) can't be merged with those "
                f"of {other.name!r} ({other.inputs} inputs, {other.outputs} outputs)"
            )
        if not other.rows:
            return
        if not self.rows:
            self._start(other.mean_x)
        device = self._xx.device
        new, old = other.rows, self.rows
        x, y = other.mean_x.to(device) - self.mean_x, other.mean_y.to(device) - self.mean_y
        weight = old * new / (old + new)
        self.xx.add_(other.xx.to(device)).addr_(x, x, alpha=weight)
        self.xy.add_(other.xy.to(device)).addr_(x, y, alpha=weight)
        self.yy.add_(other.yy.to(device)).addr_(y, y, alpha=weight)
        self._mean_x += x * (new / (old + new))
        self._mean_y += y * (new / (old + new))
        self._absorbed = old + new
        self.precision = max(self.precision, other.precision)
        self._forget_rounding()


def require_finite(name: str, x: Tensor, y: Tensor) -> None:
    """Raises: StatisticsError if the layer's input rows `x` or target rows `y` hold a NaN or an infinity."""
    for what, rows in (("inputs", x), ("target outputs", y)):
        if bool(torch.isfinite(rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)))):
            continue
        count = int(rows.numel() - torch.isfinite(rows).sum())
        if count:
            raise StatisticsError(
                f"the {what} of {name!r} hold {count} values that are NaN or infinite. Reconstruction needs finite "
                "activations: look for damaged calibration images or weights, or leave this layer out."
            )
