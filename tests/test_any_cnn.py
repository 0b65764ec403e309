"""The scoreboard's own parts: what is done is not done again, nothing hangs, and the page says what was found."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmark; it is not part of the package, and lies beside it."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.any_cnn.{name}")


def test_only_what_is_missing_is_done_after_a_kill(part: Any, tmp_path: Path) -> None:
    progress, path = part("progress"), tmp_path / "done.jsonl"
    progress.append(path, "a:1", "ours", {"result": "exact"})
    progress.append(path, "a:1", "peer", {"result": "ok"})
    path.write_bytes(path.read_bytes()[:-9])  # killed within the second line
    done = progress.read(path)
    assert progress.missing(["a:1", "a:2"], ["ours", "peer"], done, None) == [
        ("a:1", "peer"),
        ("a:2", "ours"),
        ("a:2", "peer"),
    ]
    progress.append(path, "a:1", "peer", {"result": "failed"})
    assert progress.read(path)["a:1", "peer"] == {"result": "failed"}


def test_again_redoes_what_matches_and_the_last_result_counts(part: Any, tmp_path: Path) -> None:
    progress, path = part("progress"), tmp_path / "done.jsonl"
    for result in ("timeout", "exact"):
        progress.append(path, "a:swin", "ours", {"result": result})
    progress.append(path, "a:vgg", "ours", {"result": "exact"})
    done = progress.read(path)
    assert done["a:swin", "ours"] == {"result": "exact"}
    assert progress.missing(["a:swin", "a:vgg"], ["ours"], done, "*swin*") == [("a:swin", "ours")]
    assert progress.of_table(progress.table(["a:swin", "a:vgg"], done)) == done
    assert progress.table(["a:vgg", "a:other"], done) == [{"network": "a:vgg", "ours": {"result": "exact"}}]


def test_globs_match_names_with_and_without_their_source(part: Any) -> None:
    names = ["timm:resnet18", "torchvision/classification:resnet18", "timm:vgg16"]
    chosen = part("networks").chosen
    assert chosen(names, "resnet*") == names[:2]
    assert chosen(names, "timm:*") == [names[0], names[2]]
    assert chosen(names, None) == names


def spins(name: str) -> Iterator[dict[str, Any]]:
    yield {"trace": name}
    while True:
        pass


def hangs(name: str) -> Iterator[dict[str, Any]]:
    yield {"trace": name}
    time.sleep(60)


def takes_memory(name: str) -> Iterator[dict[str, Any]]:
    yield {"bytes": len(bytearray(64 << 30))}


def fails(name: str) -> Iterator[dict[str, Any]]:
    yield {"trace": name}
    raise ValueError("no such layer\nmore")


def ends(name: str) -> Iterator[dict[str, Any]]:
    yield {"trace": name}
    yield {"result": "exact"}


@pytest.mark.parametrize(
    ("find", "limit", "expected"),
    [
        (ends, 30, {"trace": "net", "result": "exact"}),
        (hangs, 0.2, {"trace": "net", "result": "timeout", "reason": "no word for 1 s after trace"}),
        (spins, 1, {"trace": "net", "result": "timeout", "reason": "more than 1 s of the processor after trace"}),
        (fails, 30, {"trace": "net", "result": "error", "reason": "ValueError: no such layer"}),
        (takes_memory, 30, {"result": "memory", "reason": "MemoryError: "}),
    ],
)
def test_a_network_ends_with_a_result_whatever_it_does(part: Any, find: Any, limit: float, expected: Any) -> None:
    pytest.importorskip("resource", reason="limits on a process need Unix")
    assert part("child").watched(find, "net", limit, 8) == expected


def row(network: str, macs: int, **ours: Any) -> dict[str, Any]:
    found = {"before": {"macs": 100}, "after": {"macs": macs}, "attention": False, "norms": False, "free": 0.5}
    return {
        "network": network,
        "ours": {**found, "frozen": [], **ours},
        "peer": {"result": "ok", "after": {"macs": 25}, "exact": True},
        "times": {"ours_s": 1.5, "peer_s": 3.0, "ratio": 0.4},
    }


def test_the_page_counts_compares_and_gives_reasons(part: Any) -> None:
    frozen = [["the network's output", 10], ["aten.sort.default in layer1 (net.py:7) is not understood", 8]]
    rows = [
        row("timm:a", 25, result="exact", error=1e-15),
        row("timm:b", 60, result="exact", error=2e-15, frozen=frozen),
        row("timm:c", 25, result="refused", reason="Net does not run with fewer channels (at net.py:3): 12 | 13"),
    ]
    del rows[2]["times"]
    text = part("page").render({"networks": rows, "environment": {"torch": "2"}})
    assert "| all | 3 | 2 | 0 | 1 | 0 | 3 | 3 |" in text
    assert "Networks that both do: 2. Seconds, median (largest): tersenet 1.50 (1.5), Torch-Pruning 3.00 (3.0)" in text
    assert "median of 2 exact: 0.425; at most 0.30 in 1" in text
    assert "| 1 | refused: it does not run with fewer channels: N \\| N | c |" in text
    assert "| 1 | aten.sort.default is not understood | b |" in text
    assert "| timm:b | exact | 2e-15 | 50% | 0.60 | 0.40 | 1.5 | ok | yes | 0.25 | 3.0 | aten.sort.default is" in text


def test_a_difference_is_relative_to_each_output_and_never_of_nothing(part: Any) -> None:
    difference = part("subjects").difference
    large, small = torch.full((2, 3), 100.0), torch.full((2,), 1e-3)
    assert difference([large, small], [large, small * 1.5]) == pytest.approx(0.5)
    assert difference([large], [large[:, :2]]) == float("inf")
    for nothing in (torch.zeros(2, 3), torch.ones(0, 4), large * float("nan")):
        with pytest.raises(ValueError, match="nothing to compare"):
            difference([nothing], [nothing])


def test_what_a_peer_kept_is_found_by_values_and_mixed_columns_are_not_taken_for_kept(part: Any) -> None:
    only, whole = part("peer")._only, torch.randn(6, 5, 3, 3, dtype=torch.float64)
    part_of = whole[[0, 3, 4]][:, [1, 2]]
    expected = torch.zeros_like(whole)
    expected[torch.tensor([0, 3, 4])[:, None], torch.tensor([1, 2])] = part_of
    assert torch.equal(only(whole, part_of), expected)
    with pytest.raises(ValueError, match="moved"):
        only(whole, torch.stack([part_of[0], part_of[1].flip(0)]))
    with pytest.raises(ValueError, match="changed"):
        only(whole, part_of + 1)
