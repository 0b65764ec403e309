"""The transforms A^T, G and B^T of one layer: fixed, trained, or trained so that they stay exact."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.nn.winograd_settings import Flex, Quantizer
from tersenet.ops.cook_toom import Transforms, cook_toom
from tersenet.ops.winograd_stages import Matrices, kronecker

LARGEST_CONDITION = 1e6
"""Singular values of a matrix that lost its rank in float32 differ by more."""


class TransformMatrices(nn.Module):
    """forward() -> A^T (m, t), G (t, r), B^T (t, t), rounded if they are quantized.

    Parameters: `at`, `g` and `bt` for flex `full`; `log2_g` and `log2_b` (t) for `diagonal`, logarithms of what the
    rows of G and B^T are multiplied by, and the columns of A^T divided; `points` (t - 1) for `points`.
    Don't decay them: zero is no place where they should go.

    Source: MLSys 2020, arXiv 2002.10711 (`full`); Pan et al., CVPR 2025, arXiv 2412.19867 (`diagonal`).
    """

    at: Tensor
    g: Tensor
    bt: Tensor
    aa: Tensor
    gg: Tensor
    bb: Tensor

    def __init__(
        self, m: int, r: int, points: str | Sequence[str], flex: Flex = "static", quantizer: Quantizer | None = None
    ) -> None:
        super().__init__()
        self.exact: Transforms = cook_toom(m, r, points)
        self.flex = flex
        t, finite = self.exact.t, self.exact.points
        for name, values in self._derived(torch.get_default_dtype()).items():
            values = values.to(torch.get_default_device())
            if flex == "full":
                self.register_parameter(name, nn.Parameter(values))
            else:
                # Derived from the settings: not in the state dict.
                self.register_buffer(name, values, persistent=False)
        if flex == "diagonal":
            self.log2_g = nn.Parameter(torch.zeros(t))
            self.log2_b = nn.Parameter(torch.zeros(t))
        if flex == "points":
            self.points = nn.Parameter(torch.tensor([float(point) for point in finite]))
            # What `cook_toom` scaled the first row by, to have it positive.
            self._flips = bool(finite) and _vanishing(finite) < 0
        rounded = {name: FakeQuantizer(quantizer, (1, 1), _NAMES[name]) for name in _NAMES} if quantizer else {}
        self.quantizers = nn.ModuleDict(rounded)

    def forward(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        at, g, bt = (matrix.to(dtype or matrix.dtype) for matrix in self._matrices(dtype))
        if not self.quantizers:
            return at, g, bt
        return self.quantizers["at"](at), self.quantizers["g"](g), self.quantizers["bt"](bt)

    def squares(self, dtype: torch.dtype) -> Matrices:
        """The Kronecker squares of what `forward` gives. Those of transforms that stay are rounded once, not thrice."""
        if self.flex == "static" and not self.quantizers:
            return Matrices(self.aa.to(dtype), self.gg.to(dtype), self.bb.to(dtype))
        at, g, bt = self(dtype)
        return Matrices(kronecker(at), kronecker(g), kronecker(bt))

    def _matrices(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.flex == "diagonal":
            s_g, s_b = torch.exp2(self.log2_g.to(dtype)), torch.exp2(self.log2_b.to(dtype))
            return self.at / (s_g * s_b), self.g * s_g[:, None], self.bt * s_b[:, None]
        if self.flex == "points":
            return self._from_points(self.points.to(dtype))
        return self.at, self.g, self.bt

    def _from_points(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The formulas of `cook_toom`, differentiable in the points."""
        m, r, t = self.exact.m, self.exact.r, self.exact.t
        powers = [torch.ones_like(points)]
        for _ in range(max(m, r) - 1):
            powers.append(powers[-1] * points)
        # No index tensor: it would be copied to the device in every pass.
        others = torch.stack([torch.cat((points[:i], points[i + 1 :])) for i in range(t - 1)])
        f = (points[:, None] - others).prod(1)
        sign = torch.ones_like(points)
        if self._flips:
            sign = torch.cat((-sign[:1], sign[1:]))
        at = torch.cat((torch.stack(powers[:m]), _unit(points, m)[:, None]), 1)
        g = torch.cat((torch.stack(powers[:r], 1) * (sign / f)[:, None], _unit(points, r)[None]))
        rows = nn.functional.pad(_coefficients(others), (0, 1)) * sign[:, None]
        return at, g, torch.cat((rows, _coefficients(points[None]))).view(t, t)

    def check(self) -> None:
        """Raises: TersenetError for transforms or ranges that are not finite, or that lost their rank in training."""
        with torch.no_grad():
            matrices = self._matrices(None)
        size = f"F({self.exact.m}, {self.exact.r})"
        for name, matrix in zip(_NAMES, matrices, strict=True):
            values = torch.linalg.svdvals(matrix.detach().double()) if torch.isfinite(matrix).all() else None
            ratio = float("nan") if values is None else float(values[0] / values[-1])
            # Also false for NaN.
            if not ratio < LARGEST_CONDITION:
                raise TersenetError(
                    f"the {_NAMES[name]} of {size} is singular (condition number {ratio:.3g}, "
                    f"must be below {LARGEST_CONDITION:.0e}): train it with a lower learning rate and no weight decay"
                )
        for quantizer in self.quantizers.children():
            assert isinstance(quantizer, FakeQuantizer)
            quantizer.check()

    def _derived(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What follows from the settings, by name, on the CPU: the transforms, and their squares where they stay."""
        rows: dict[str, Any] = {"at": self.exact.at, "g": self.exact.g, "bt": self.exact.bt}
        exact = {
            name: torch.tensor([[float(x) for x in row] for row in m], dtype=torch.float64, device="cpu")
            for name, m in rows.items()
        }
        if self.flex == "static":
            exact |= {square: kronecker(exact[name]) for square, name in (("aa", "at"), ("gg", "g"), ("bb", "bt"))}
        return {name: values.to(dtype) for name, values in exact.items()}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """A change of type or device starts from the fractions again: 1/3 in float32 is not 1/3 in float64."""
        super()._apply(*args, **kwargs)
        if self.flex == "full" or self.at.device.type == "meta":
            return self
        for name, values in self._derived(torch.promote_types(self.at.dtype, torch.float32)).items():
            setattr(self, name, values.to(self.at.device))
        return self


_NAMES = {"at": "transform A", "g": "transform G", "bt": "transform B"}


def _vanishing(points: Sequence[Fraction]) -> Fraction:
    product = Fraction(1)
    for point in points[1:]:
        product *= points[0] - point
    return product


def _unit(like: Tensor, size: int) -> Tensor:
    return nn.functional.pad(like.new_ones(1), (size - 1, 0))


def _coefficients(points: Tensor) -> Tensor:
    """(rows, n) -> (rows, n + 1): coefficients of prod (x - p) for each row of points, lowest power first."""
    found = points.new_ones(points.shape[0], 1)
    for column in points.unbind(1):
        found = nn.functional.pad(found, (1, 0)) - nn.functional.pad(found * column[:, None], (0, 1))
    return found
