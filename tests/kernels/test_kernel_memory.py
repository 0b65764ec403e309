"""Tensors in huge pages are tensors like any other."""

from __future__ import annotations

import gc

import pytest
import torch

from tersenet.kernels import memory
from tersenet.kernels.memory import PAGE_BYTES, settled, zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_zeros_begin_at_a_page_and_can_be_written_to_the_end(dtype: torch.dtype) -> None:
    made = zeros((3, 700_001), dtype)
    assert made.shape == (3, 700_001)
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert made.data_ptr() % PAGE_BYTES == 0 or memory._ADVICE is None  # pyright: ignore[reportPrivateUsage]
    assert not bool(made.any())
    assert bool((made.fill_(1) == 1).all())


def test_memory_stays_as_long_as_a_view_of_it() -> None:
    views = [zeros((1_000_000,)).fill_(k)[-10:] for k in range(20)]
    gc.collect()
    assert all(bool((view == k).all()) for k, view in enumerate(views))


@pytest.mark.parametrize("size", [10, PAGE_BYTES // 8, PAGE_BYTES])
def test_settled_values_are_the_same(size: int) -> None:
    source = torch.randn(2, size).T
    found = settled(source)
    assert found.is_contiguous()
    assert torch.equal(found, source)


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_ADVICE", None)
    assert torch.equal(zeros((5, 7)), torch.zeros(5, 7))
    source = torch.randn(1000, 1000).T
    assert torch.equal(settled(source), source)


def test_nothing() -> None:
    assert zeros((0, 4)).shape == (0, 4)
