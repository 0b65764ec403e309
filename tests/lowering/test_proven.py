"""What was checked before is not checked again, as long as nothing that decides about it has changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tersenet as tn
from tersenet.kernels import cache
from tersenet.lowering import lower as lower_module
from tersenet.lowering.assign import Assignment
from tersenet.lowering.proven import evidence

Kept = dict[str, bytes]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the checks that were made."""
    made: list[str] = []

    def counted(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def check(*args: Any) -> Any:
            made.append(name)
            return before(*args)

        monkeypatch.setattr(owner, name, check)

    counted(Assignment, "judged")
    counted(lower_module, "compared")
    return made


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """A cache in memory."""
    found: Kept = {}

    def read(name: str, key: bytes) -> bytes | None:
        return found.get(name)

    def write(name: str, key: bytes, payload: bytes) -> None:
        found[name] = payload

    monkeypatch.setattr(cache, "read", read)
    monkeypatch.setattr(cache, "write", write)
    return found


def test_a_network_is_checked_once(network: nn.Module, checks: list[str]) -> None:
    x = torch.rand(2, 3, 12, 12)
    first = tn.lower(network, x, choice="F4")
    assert checks == ["judged", "compared"]
    again = tn.lower(copy.deepcopy(network), x, choice="F4")
    assert checks == ["judged", "compared"]
    assert again.report == first.report
    assert first.report.error > 0
    assert torch.equal(again(x), first(x))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight": lambda net: net[3].weight.data[5, 7, 1, 2].mul_(1 + 2e-7),
    "sign of a channel": lambda net: net[3].weight.data[:, 1].neg_(),
    "norm": lambda net: net[1].running_mean.add_(0.1),
    "padding": lambda net: setattr(net[3], "padding", (0, 0)),
    "activation": lambda net: net.__setitem__(4, nn.ReLU6()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_checked(change: str, network: nn.Module, checks: list[str]) -> None:
    x = torch.rand(2, 3, 12, 12)
    tn.lower(network, x, choice="F2")
    checks.clear()
    CHANGES[change](network)
    fast = tn.lower(network, x, choice="F2")
    assert checks == ["judged", "compared"]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


def test_other_sizes_choices_and_code_are_checked(
    network: nn.Module, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(2, 3, 12, 12)
    tn.lower(network, x, choice="F2")
    for again in (lambda: tn.lower(network, x[:1], choice="F2"), lambda: tn.lower(network, x, choice="F4")):
        checks.clear()
        again()
        assert checks == ["judged", "compared"]
    monkeypatch.setattr("tersenet.lowering.proven._own_code", lambda: "another version")
    checks.clear()
    tn.lower(network, x, choice="F2")
    assert checks == ["judged", "compared"]


def test_a_smaller_tolerance_is_checked(network: nn.Module, checks: list[str]) -> None:
    x = torch.rand(1, 3, 12, 12)
    error = tn.lower(network, x, choice="F4").report.error
    with pytest.raises(tn.GraphError, match="more than the tolerance"):
        tn.lower(network, x, choice="F4", tolerance=error / 2)
    checks.clear()
    tn.lower(network, x, choice="F4", tolerance=error * 2)
    assert not checks


DAMAGE: list[Callable[[dict[str, Any]], Any]] = [
    lambda found: [],
    lambda found: {**found, "error": "much"},
    lambda found: {**found, "error": float("nan")},
    lambda found: {**found, "layers": {}},
    lambda found: {**found, "layers": {name: {**one, "choice": "F6"} for name, one in found["layers"].items()}},
    lambda found: {**found, "layers": dict.fromkeys(found["layers"], 1)},
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_this_version_does_not_write_is_not_taken(
    damage: Callable[[dict[str, Any]], Any], network: nn.Module, checks: list[str], kept: Kept
) -> None:
    x = torch.rand(1, 3, 12, 12)
    first = tn.lower(network, x, choice="F2").report
    (name,) = [one for one in kept if one.startswith("proof-")]
    kept[name] = json.dumps(damage(json.loads(kept[name]))).encode()
    checks.clear()
    assert tn.lower(network, x, choice="F2").report == first
    assert checks == ["judged", "compared"]
    assert tn.lower(network, x, choice="F2").report == first
    assert checks == ["judged", "compared"]


SMALL_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "one number": lambda w: w[3, 5].mul_(1 + 2e-7),
    "the last number": lambda w: w[-1, -1].neg_(),
    "all signs": lambda w: w.neg_(),
    "signs of a column": lambda w: w[:, 1].neg_(),
    "signs of every other row": lambda w: w[::2].neg_(),
    "two columns": lambda w: w.index_copy_(1, torch.tensor([0, 8]), w[:, [8, 0]]),
    "two rows": lambda w: w.index_copy_(0, torch.tensor([0, 64]), w[[64, 0]]),
}


@pytest.mark.parametrize("change", SMALL_CHANGES)
@pytest.mark.parametrize("rows", [2048, 2049])
def test_a_large_weight_is_read_whole(change: str, rows: int) -> None:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))

    def shown() -> tuple[str, str, str]:
        graph = fx.symbolic_trace(nn.ReLU())
        graph.register_buffer("weight", weight)
        return evidence(nn.ReLU(), graph, ())

    before = shown()
    assert shown() == before
    SMALL_CHANGES[change](weight)
    assert shown() != before
