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
from typing import Protocol

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.moments_call import TileMoments, usable

_ROWS = 2048  # rows per matrix product
_TILE = 256  # columns per tile of the symmetric product: tiles above the diagonal are not computed
_PIECE = 1 << 18  # values that are looked at while they are in the cache from being copied
_WIDE = 512  # inputs and outputs from which on matrix tiles are worth their memory, some huge pages


class StatisticsError(TersenetError):
    """Activations from which nothing can be computed; the message names the layer."""


class Moments:
    """Count, means and centred second moments of input rows `x` (N, D) and target rows `y` (N, O).

    `xx` (D, D), `xy` (D, O), `yy` (O, O) are sums over rows of products of deviations from the mean (not divided by N),
    in float64 on the device of the rows. Products are made in the precision of the first rows added, at least float32,
    over centred blocks; `precision` is that type's machine epsilon. Blocks have a fixed number of rows, so one stream
    gives the same bits in whatever chunks it arrives. On processors with matrix tiles, float32 products of wide layers
    are made of whole numbers there, in less than half the time (`kernels/moments.py`).

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        """`name` of the layer appears in every message about these moments."""
        if inputs < 1 or outputs < 1:
            raise ValueError(f"moments of {name!r} need at least one input and output, not {inputs} and {outputs}")
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.precision = 0.0
        self._absorbed = self._pending = 0
        self._settled = self._mirrored = True
        self._blocks: Blocks | None = None  # from the first row on
        nothing, columns = torch.zeros((), dtype=torch.float64), inputs + outputs
        self._place(nothing.expand(columns, columns), nothing.expand(columns))

    def _place(self, sums: Tensor, means: Tensor) -> None:
        """Columns are outputs first: `xy` is below the diagonal then."""
        y, x = slice(self.outputs), slice(self.outputs, None)
        self._xx, self._xy, self._yy = sums[x, x], sums[x, y], sums[y, y]
        self._mean_x, self._mean_y = means[x], means[y]

    @property
    def rows(self) -> int:
        """How many rows were added."""
        return self._absorbed + self._pending

    @property
    def mean_x(self) -> Tensor:
        """(D,), float64."""
        self._settle()
        return self._mean_x

    @property
    def mean_y(self) -> Tensor:
        """(O,), float64."""
        self._settle()
        return self._mean_y

    @property
    def xx(self) -> Tensor:
        """(D, D), float64; not a copy."""
        self._mirror()
        return self._xx

    @property
    def lower(self) -> Tensor:
        """(D, D), float64: `xx` on and below the diagonal, and above it anything; not a copy."""
        self._settle()
        return self._xx

    @property
    def xy(self) -> Tensor:
        """(D, O), float64; not a copy."""
        self._settle()
        return self._xy

    @property
    def yy(self) -> Tensor:
        """(O, O), float64; not a copy."""
        self._mirror()
        return self._yy

    @property
    def energy(self) -> float:
        """The targets' sum of squared deviations from their means, over all rows and outputs."""
        self._settle()
        return float(self._yy.trace())

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
        if not len(x):
            return
        blocks = self._blocks or self._start(x)
        size, pending, done = len(blocks.rows), self._pending, 0
        while done < len(x):
            if pending == size:
                # What is absorbed can't be left out again.
                require_finite(self.name, x[done:], y[done:])
                self._pending, pending = pending, 0
                self._absorb()
            end = min(len(x), done + size - pending, done + max(1, _PIECE // (self.inputs + self.outputs)))
            place = blocks.rows[pending : pending + end - done]
            place[:, self.outputs :] = x[done:end].detach()
            place[:, : self.outputs] = y[done:end].detach()
            if not math.isfinite(float(place.sum())):
                require_finite(self.name, x, y)
            pending, done = pending + end - done, end
        self._pending = pending

    def of_outputs(self, chosen: Tensor) -> Moments:
        """The same inputs with only the outputs `chosen` (O,) bool, to be read and not added to: `xx` is shared."""
        if bool(chosen.all()):
            return self
        whole = self.xx  # with all rows, and mirrored, before anything is copied
        part = copy.copy(self)
        part._xx, part._xy, part._yy = whole, self.xy[:, chosen], self.yy[chosen][:, chosen]
        part._mean_y, part.outputs = self.mean_y[chosen], int(chosen.sum())
        return part

    def _start(self, x: Tensor) -> Blocks:
        kind = torch.promote_types(x.dtype, torch.float32)
        self.precision = torch.finfo(kind).eps
        columns = self.inputs + self.outputs
        on_tiles = kind == torch.float32 and x.device.type == "cpu" and columns >= _WIDE and usable()
        self._blocks = TileMoments(columns) if on_tiles else _Products(columns, kind, x.device)
        self._place(self._blocks.sums, self._blocks.means)
        return self._blocks

    def _absorb(self) -> None:
        """Move the buffered rows into the sums."""
        if self._blocks is not None and self._pending:
            self._blocks.add(self._pending, self._absorbed)
            self._absorbed, self._pending = self._absorbed + self._pending, 0
            self._settled = self._mirrored = False

    def _settle(self) -> None:
        """All rows are in, and constants have moments 0, not those of their rounding errors, which would be divided by
        like data."""
        self._absorb()
        if self._settled or self._blocks is None:
            return
        sums, means = self._blocks.sums, self._blocks.means
        still = sums.diagonal() <= self._absorbed * (16 * self.precision * means).square()
        if bool(still.any()):
            sums[still] = 0
            sums[:, still] = 0
        self._settled = True

    def _mirror(self) -> None:
        """What is above the diagonals becomes what is below them."""
        self._settle()
        if self._mirrored:
            return
        for matrix in (self._xx, self._yy):
            for start in range(0, len(matrix), _TILE):
                rows = matrix[start : start + _TILE]
                square = rows[:, start : start + _TILE]
                square.copy_(square.tril() + square.tril(-1).T)
                matrix[:start, start : start + _TILE] = rows[:, :start].T
        self._mirrored = True

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
        if self._blocks is None:
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
        self._settled = False


class Blocks(Protocol):
    """Sums over rows that come block by block: `rows` (most, columns) are written before `add`.

    `means` (columns,) and `sums` (columns, columns), of products of deviations from the mean, are float64. Of `sums`,
    only what lies on and below the diagonal counts.
    """

    rows: Tensor
    means: Tensor
    sums: Tensor

    def add(self, new: int, old: int) -> None:
        """Take in the first `new` of the rows; `old` ones are in the sums."""


class _Products:
    """`Blocks` by torch's matrix products, in any precision and on any device."""

    def __init__(self, columns: int, kind: torch.dtype, device: torch.device) -> None:
        # One row more: it carries the distance between the block's mean and the mean so far.
        self._block = torch.empty(_ROWS + 1, columns, dtype=kind, device=device)
        self.rows = self._block[:_ROWS]
        self.means = torch.zeros(columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, new: int, old: int) -> None:
        """Products are made of deviations from the block's own mean. What that leaves out, the outer product of the
        distance of the two means, comes in as one more row."""
        rows, own = self.rows[:new], torch.zeros_like(self.means)
        for _ in range(2):  # the second time, what rounding has left of a mean far from zero
            rest = rows.mean(0)
            rows -= rest
            own += rest
        apart = own - self.means
        self._block[new] = apart * math.sqrt(old * new / (old + new))
        self.means += apart * (new / (old + new))
        block = self._block[: new + 1]
        for start in range(0, block.shape[1], _TILE):
            end = start + _TILE
            self.sums[start:end, :end] += block[:, start:end].T @ block[:, :end]


def require_finite(name: str, x: Tensor, y: Tensor) -> None:
    """Raises: StatisticsError if the layer's input rows `x` or target rows `y` hold a NaN or an infinity."""
    for what, rows in (("inputs", x), ("target outputs", y)):
        if math.isfinite(float(rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)))):
            continue
        count = int(rows.numel() - torch.isfinite(rows).sum())
        if count:
            raise StatisticsError(
                f"the {what} of {name!r} hold {count} values that are NaN or infinite. Reconstruction needs finite "
                "activations: look for damaged calibration images or weights, or leave this layer out."
            )
