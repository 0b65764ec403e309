"""Layers that write their result over the residual: only where nobody reads that afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tersenet as tn
from graph_support import randomise
from tersenet.lowering.fold import fold_affine
from tersenet.lowering.fuse import fuse
from tersenet.lowering.layers import WINOGRAD, Layer, has_amx, needs_amx
from tersenet.lowering.modules import build
from tersenet.lowering.program import program


class Sums(nn.Module):
    """Residuals that are free, that are read later, that a view of is read later, and that are inputs or outputs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("stem", "free", "twice", "viewed", "given", "shown", "late", "last"):
            self.add_module(name, nn.Conv2d(8, 8, size, padding=size // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x).relu()
        y = (self.free(y.sigmoid()) + y).relu()
        a = self.twice(y.tanh()) + y  # y is read again below
        a = (self.late(a.tanh()) + a).relu()
        b = y * 2 + a
        part = b[:, :4]
        c = self.viewed(b.tanh()) + b  # `part` shares memory with b
        d = self.given(c) + x  # the caller's own tensor
        e = self.shown(d) + d
        return self.last(e.tanh()) + part.repeat(1, 2, 1, 1), d, e


def reused(model: nn.Module) -> dict[str, bool]:
    made = program(model, (torch.rand(1, 8, 9, 9),))
    fold_affine(made)
    return {layer.name: layer.reuse for layer in fuse(made).values()}


def test_which_residuals_are_free() -> None:
    found = reused(randomise(Sums(1)))
    assert {name for name, free in found.items() if free} == {"free", "late", "last"}
    assert len(found) == 8


@pytest.mark.parametrize(("size", "choice"), [(1, "gemm"), (3, "F2"), (3, "F4"), (1, "direct"), (3, "torch")])
def test_the_same_outputs(size: int, choice: str) -> None:
    model = randomise(Sums(size)).eval()
    x = torch.rand(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    fast = tn.lower(model, x, choice=choice)
    assert {layer.choice for layer in fast.report.layers} == {choice}
    for _ in range(3):
        with torch.no_grad():
            for a, b in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(x, before)


def test_a_shortcut_that_only_the_input_reads() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.conv(y) + y  # what is read can't be written over

    assert reused(Own()) == {"stem": False, "conv": False}


NEEDS_AMX = pytest.mark.skipif(not has_amx(), reason="no AMX tiles here")
KERNELS = ["direct", "gemm", "amx", *WINOGRAD]


@pytest.mark.parametrize(
    "choice", [pytest.param(name, marks=NEEDS_AMX) if needs_amx(name) else name for name in KERNELS]
)
def test_where_the_result_lies(choice: str) -> None:
    size = 1 if choice in ("gemm", "amx") else 3
    weight = torch.randn(6, 6, size, size)
    x, residual = (torch.randn(1, 6, 7, 7).contiguous(memory_format=torch.channels_last) for _ in range(2))
    sides = ((1, 1), (size // 2,) * 2, (1, 1))
    results: list[Tensor] = []
    for reuse in (False, True):
        kernel = build(Layer("", weight, None, *sides, 1, True, "relu", reuse), choice, (1, 6, 7, 7))
        with torch.no_grad():
            kernel(x, residual.clone(memory_format=torch.channels_last))  # the first call of a size may go past
            given = residual.clone(memory_format=torch.channels_last)
            results.append(kernel(x, given))
        assert (results[-1].data_ptr() == given.data_ptr()) == reuse
        # Another memory order is not written over.
        with torch.no_grad():
            other = residual.contiguous()
            kernel(x, other)
            found = kernel(x, other)
        assert torch.equal(other, residual)
        torch.testing.assert_close(found, results[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*results)
