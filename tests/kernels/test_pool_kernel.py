"""The generated max pooling against torch's, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ISAS, same
from torch import Tensor

from tersenet.kernels import threads
from tersenet.kernels.pool_call import NO_TABLES, Windows, pool_call


def pooled(x: Tensor, windows: Windows, isa: str | None = None) -> Tensor:
    return pool_call(tuple(x.shape), x.stride(), windows, threads.available(), isa).run(x, NO_TABLES, None)


@settings(max_examples=80, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    n=st.integers(0, 2),
    c=st.integers(1, 150),
    sides=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    step=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    ceil=st.booleans(),
    holes=st.booleans(),
)
@example("avx512", 1, 64, (13, 13), (3, 3), (2, 2), (1, 1), True, False)
def test_equals_torch(
    isa: str, n: int, c: int, sides: tuple[int, int], size: tuple[int, int], step: tuple[int, int],
    pads: tuple[int, int], ceil: bool, holes: bool,
) -> None:  # fmt: skip
    padding = (min(pads[0], size[0] // 2), min(pads[1], size[1] // 2))
    h, w = (max(side, one - 2 * pad) for side, one, pad in zip(sides, size, padding, strict=True))
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(c)).contiguous(
        memory_format=torch.channels_last
    )
    if holes:
        x[x.abs() < 0.3] = math.nan
        x[x > 1] = -math.inf
    expected = F.max_pool2d(x, size, step, padding, ceil_mode=ceil)
    found = pooled(x, Windows(size, step, padding, ceil), isa if isa in ISAS else None)
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_other_memory() -> None:
    """A slice of channels and pixels, and channels that are one apart by chance."""
    wide = torch.full((2, 12, 13, 70), math.nan).permute(0, 3, 1, 2)
    x = wide[:, 3:53, 1:11, 2:12]
    x.copy_(torch.randn(2, 50, 10, 10))
    windows = Windows((2, 2), (2, 2), (0, 0))
    assert same(pooled(x, windows), pooled(x.contiguous(memory_format=torch.channels_last), windows))


@pytest.mark.parametrize("count", [2, 3])
def test_threads_change_nothing(count: int) -> None:
    x = torch.randn(3, 70, 40, 40).contiguous(memory_format=torch.channels_last)
    windows = Windows((3, 3), (2, 2), (1, 1))
    before, expected = torch.get_num_threads(), pooled(x, windows)
    torch.set_num_threads(count)
    try:
        assert same(pooled(x, windows), expected)
    finally:
        torch.set_num_threads(before)
