"""Times taken inside the network, and what follows from them for the network as a whole."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersenet as tn
from tersenet.lowering import contest, lower, timings, verdict
from tersenet.lowering.contest import layers_timed, passes_timed


class Slow(nn.Module):
    """What `inner` gives, after so many milliseconds of work."""

    def __init__(self, inner: nn.Module, ms: float) -> None:
        super().__init__()
        self.inner, self.ms = inner, ms

    def forward(self, x: Tensor) -> Tensor:
        end = time.thread_time() + self.ms / 1e3
        while time.thread_time() < end:
            pass
        return self.inner(x)


@pytest.fixture(autouse=True)
def always_lowered() -> None:
    """Not in these tests."""


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "ROUNDS", (3, 3))


def test_every_kernel_is_timed_in_its_place() -> None:
    inner = nn.ReLU()
    network = torch.fx.symbolic_trace(nn.Sequential(nn.Sigmoid(), nn.Tanh()))
    kernels = {"0": {"direct": Slow(inner, 4), "F2": Slow(inner, 1)}, "1": {"direct": Slow(inner, 2)}}
    before = [network.get_submodule(target) for target in kernels]
    found = layers_timed(network, kernels, lambda: network(torch.ones(2)))
    assert found.keys() == kernels.keys()
    assert {target: set(times) for target, times in found.items()} == {"0": {"direct", "F2"}, "1": {"direct"}}
    assert found["0"]["direct"] >= 4
    assert 1 <= found["0"]["F2"] < 4
    assert found["1"]["direct"] >= 2
    assert [network.get_submodule(target) for target in kernels] == before


def test_the_network_is_put_back_when_a_kernel_fails() -> None:
    network = torch.fx.symbolic_trace(nn.Sequential(nn.Sigmoid(), nn.Tanh()))
    before = network.get_submodule("0")

    def fails() -> Any:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        layers_timed(network, {"0": {"direct": nn.ReLU()}}, fails)
    assert network.get_submodule("0") is before


def test_passes() -> None:
    found = passes_timed({"a": lambda: Slow(nn.ReLU(), 3)(torch.ones(1)), "b": lambda: nn.ReLU()(torch.ones(1))})
    assert found["a"] >= 3 > found["b"]


def test_what_is_clearly_faster() -> None:
    faster = verdict.faster_than_lowered
    assert faster({"lowered": 10.0, "as it was": 9.9, "in channels-last memory": 11.0}) is None
    assert faster({"lowered": 10.0, "as it was": 9.0, "in channels-last memory": 11.0}) == "as it was"
    assert faster({"lowered": 10.0, "as it was": 9.0, "in channels-last memory": 8.0}) == "in channels-last memory"


@pytest.mark.parametrize("best", [verdict.ORIGINAL, verdict.ORDERED])
def test_a_network_that_is_faster_stays_as_it_was(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    times = {verdict.LOWERED: 2.0, verdict.ORIGINAL: 3.0, verdict.ORDERED: 3.0} | {best: 1.0}
    monkeypatch.setattr(lower, "passes", lambda *args: times)
    fast = tn.lower(model, torch.rand(1, 3, 9, 9))
    assert fast.report.kept
    assert fast.report.passes == times
    assert fast.report.layers == ()
    assert "stays as it was" in fast.report.notes[-1]
    assert "as it was 1.000 ms" in str(fast.report) or "channels-last memory 1.000 ms" in str(fast.report)
    assert model.training
    x = torch.randn(2, 3, 9, 9)
    expected = model.eval()(x)
    with torch.no_grad():
        model[0].weight.zero_()  # nothing is shared
    found = fast(x)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert found.is_contiguous(memory_format=torch.channels_last) == (best == verdict.ORDERED)
    with pytest.raises(tn.TersenetError, match="lower it again"):
        fast(torch.rand(1, 3, 9, 8))


def test_passes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "faster_than_lowered", lambda times: None)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.rand(1, 3, 10, 10)
    first = tn.lower(model, x)
    assert set(first.report.passes) == {verdict.LOWERED, verdict.ORIGINAL, verdict.ORDERED}
    assert all(ms > 0 for ms in first.report.passes.values())

    def never(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(verdict, "passes_timed", never)
    assert tn.lower(model, x).report.passes == first.report.passes
    wider = nn.Sequential(nn.Conv2d(3, 9, 3))
    with pytest.raises(AssertionError, match="measured again"):
        tn.lower(wider, x)


def test_a_network_that_can_t_be_copied_is_lowered_all_the_same() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lock = nn.Conv2d(3, 5, 3), threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    fast = tn.lower(Locked(), torch.rand(1, 3, 10, 10))
    assert fast.report.passes == {}
    assert not fast.report.kept
    assert fast(torch.rand(2, 3, 10, 10)).shape == (2, 5, 8, 8)


def test_a_forced_choice_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(contest, "passes_timed", never)
    monkeypatch.setattr(verdict, "passes_timed", never)
    fast = tn.lower(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 9, 9), choice="direct")
    assert fast.report.passes == {}
    assert not fast.report.kept


DAMAGE: list[Callable[[dict[str, Any]], Any]] = [
    lambda found: [],
    lambda found: {**found, "x": {}},
    lambda found: {"a": {"b": 0.0}},
    lambda found: {"a": {"b": "1"}},
    lambda found: {"a": 1.0},
    lambda found: {"a": {"c": 1.0}},
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_remembered(damage: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(timings.cache, "read", lambda name, key: kept.get(name))
    monkeypatch.setattr(timings.cache, "write", lambda name, key, data: kept.__setitem__(name, data))
    calls: list[int] = []

    def measure() -> dict[str, dict[str, float]]:
        calls.append(1)
        return {"a": {"b": float(len(calls))}}

    def ask() -> dict[str, dict[str, float]]:
        return timings.remembered("test", ("what",), {"a": ["b"]}, measure, [])

    assert ask() == ask() == {"a": {"b": 1.0}}
    (name,) = kept
    kept[name] = json.dumps(damage({"a": {"b": 1.0}})).encode()
    assert ask() == ask() == {"a": {"b": 2.0}}
