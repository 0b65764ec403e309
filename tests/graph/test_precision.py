"""Comparisons in full float32. There may be no GPU: what is tested are torch's switches."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.graph.precision import full_float32
from tersenet.graph.proof import compare


def switches() -> dict[str, str]:
    backends = torch.backends
    return {
        "cudnn": backends.cudnn.conv.fp32_precision,
        "cuda matmul": backends.cuda.matmul.fp32_precision,
        "cpu convolution": backends.mkldnn.conv.fp32_precision,
        "cpu matmul": backends.mkldnn.matmul.fp32_precision,
    }


@pytest.fixture(autouse=True)
def fast() -> Generator[None]:
    """The switches as somebody sets them for speed; torch's own defaults afterwards."""
    assert torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    assert torch.backends.cudnn.allow_tf32


class Watcher(nn.Sequential):
    """Notes the switches whenever it runs outside a trace."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
        # A pass leaves no traces in the network itself.
        self.notes = SimpleNamespace(seen=[])

    @property
    def seen(self) -> list[dict[str, str]]:
        return self.notes.seen

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.compiler.is_compiling():
            self.notes.seen.append(switches())
        return super().forward(x)


def test_it_is_off_inside_and_as_before_afterwards() -> None:
    before = switches()
    assert before["cudnn"] == before["cuda matmul"] == "tf32"
    with full_float32():
        assert set(switches().values()) == {"ieee"}
        # The older names still answer, and agree.
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert switches() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        _ = 1 / 0
    assert switches() == before
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "medium"


def test_switches_set_by_their_newer_names_only() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = switches()
    with full_float32():
        assert set(switches().values()) == {"ieee"}
    assert switches() == before


def test_networks_are_compared_without_tf32() -> None:
    a, b = Watcher(), Watcher()
    before = switches()
    compare(a, b, (torch.zeros(1, 3, 6, 6),))
    assert [set(seen.values()) for seen in a.seen + b.seen] == [{"ieee"}, {"ieee"}]
    assert switches() == before


def test_constants_are_measured_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersenet.graph import replay

    seen: list[dict[str, str]] = []
    run = replay._Replay.__torch_dispatch__  # pyright: ignore[reportPrivateUsage]

    def watched(self: object, *args: object) -> object:
        seen.append(switches())
        return run(self, *args)  # pyright: ignore

    monkeypatch.setattr(replay._Replay, "__torch_dispatch__", watched)  # pyright: ignore[reportPrivateUsage]
    compact(ModelGraph(Watcher(), (torch.zeros(1, 3, 6, 6),)), {"0": np.arange(2)})
    assert seen
    assert all(set(found.values()) == {"ieee"} for found in seen)
