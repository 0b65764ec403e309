"""What is kept comes back as it was, from memory or from files, and belongs to whoever gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tersenet.calibration.store import Store


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def value(seed: int) -> dict[int, Any]:
    drawn = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 4, 4, generator=drawn).to(memory_format=torch.channels_last)
    return {1: image, 7: (torch.randn(5, generator=drawn), None)}


SIZE = 4 * (2 * 3 * 4 * 4 + 5)


@pytest.mark.parametrize("memory", [0, SIZE, 10 * SIZE])
def test_values_come_back_with_bits_and_memory_order(files: Path, memory: int) -> None:
    store = Store(memory)
    for number in range(3):
        store.put(str(number), value(number))
    assert len(list(files.rglob("*.pt"))) == 3 - min(3, memory // SIZE)
    for number in (2, 0, 1, 0):
        found, wanted = store.get(str(number)), value(number)
        assert torch.equal(found[1], wanted[1])
        assert found[1].stride() == wanted[1].stride()
        assert torch.equal(found[7][0], wanted[7][0])
        assert found[7][1] is None
        found[1].zero_()  # what is kept stays
    del store
    assert not list(files.rglob("*.pt"))


def test_what_is_replaced_gives_its_memory_back(files: Path) -> None:
    store = Store(SIZE)
    for turn in range(3):
        store.put("one", value(turn))
        assert torch.equal(store.get("one")[1], value(turn)[1])
    assert not list(files.rglob("*.pt"))
    store.put("two", value(5))
    store.put("one", {1: torch.zeros(10 * SIZE)})  # too large now: it goes to a file, and others may have its place
    store.put("two", value(6))
    assert len(list(files.rglob("*.pt"))) == 2
    assert torch.equal(store.get("two")[1], value(6)[1])
    assert store.get("one")[1].numel() == 10 * SIZE
