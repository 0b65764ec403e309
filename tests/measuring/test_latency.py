"""What is run, how often and in which order; never how fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.measuring import latency as timing
from tersenet.measuring.latency import compare, latency
from tersenet.measuring.macs import LayerCost
from tersenet.measuring.measure import layer_rows, measure
from tersenet.results import Accuracy

LOG: list[Any] = []


class Probe(nn.Module):
    """Logs its name and the state in which it is run. The log is global: what is timed is a copy."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        LOG.append(
            (
                self.name,
                self.training,
                torch.is_inference_mode_enabled(),
                x.is_contiguous(memory_format=torch.channels_last),
            )
        )
        return self.conv(x)


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    LOG.clear()


EXAMPLE = torch.zeros(2, 3, 8, 8)


def test_turns_are_interleaved_and_rotate() -> None:
    models: dict[str, nn.Module] = {name: Probe(name) for name in "abc"}
    compare(models, EXAMPLE, runs=3, warmup=1)
    rounds = ["".join(entry[0] for entry in LOG[at : at + 3]) for at in range(0, len(LOG), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_runs_in_eval_and_inference_mode_and_channels_last() -> None:
    net = Probe("net").train()
    measured = latency(net, EXAMPLE, runs=4, warmup=2)
    assert LOG == [("net", False, True, True)] * 6
    assert (measured.runs, measured.batch, measured.device) == (4, 2, "cpu")
    assert measured.threads == torch.get_num_threads()
    assert 0 < measured.low_ms <= measured.median_ms <= measured.high_ms
    assert net.training
    assert net.conv.weight.is_contiguous()
    assert EXAMPLE.is_contiguous()


def test_statistics_are_the_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([t for ms in (50, 1, 5, 2, 3, 4) for t in (0, ms * 1_000_000)])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(clock))
    measured = latency(nn.Identity(), torch.zeros(3), runs=5, warmup=1)
    assert (measured.low_ms, measured.median_ms, measured.high_ms) == (2, 3, 4)


def test_inputs_that_are_not_images() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    assert latency(Two(), {"a": torch.zeros(5), "b": torch.zeros(5)}, runs=1, warmup=0).batch == 5
    assert compare({}, EXAMPLE) == {}


@pytest.mark.parametrize(("runs", "warmup"), [(0, 1), (3, -1)])
def test_counts_are_checked(runs: int, warmup: int) -> None:
    with pytest.raises(TersenetError, match="at least"):
        latency(nn.Identity(), EXAMPLE, runs=runs, warmup=warmup)


def test_measure() -> None:
    net = Probe("net")
    accuracy = Accuracy(n=50, top1=0.5, top5=0.75)
    result = measure(net, EXAMPLE, accuracy=accuracy, latency=False)
    assert (result.params, result.macs, result.bytes) == (112, 2 * 36 * 4 * 27, 448)
    assert (result.top1, result.top5, result.n_eval, result.latency, result.latency_ms) == (0.5, 0.75, 50, None, None)
    assert result.peak_memory_bytes == 448 + 4 * 2 * (3 * 64 + 4 * 36)
    timed = latency(net, EXAMPLE, runs=1, warmup=0)
    assert measure(net, EXAMPLE, latency=timed).latency_ms == timed.median_ms
    assert measure(net, EXAMPLE).latency is not None


def test_layer_rows_join_two_tables() -> None:
    before = {"a": LayerCost("conv 3x3", 3, 8, 100, 10), "gone": LayerCost("linear", 8, 2, 16, 18)}
    after = {"a": LayerCost("conv 3x3", 3, 4, 50, 5), "a.1": LayerCost("conv 1x1", 4, 8, 7, 6)}
    kept, gone, new = layer_rows(before, after)
    assert (kept.in_before, kept.in_after, kept.out_before, kept.out_after, kept.note) == (3, 3, 8, 4, "")
    assert (kept.macs_before, kept.macs_after, kept.params_before, kept.params_after) == (100, 50, 10, 5)
    assert (gone.name, gone.kind, gone.macs_before, gone.macs_after, gone.note) == ("gone", "linear", 16, 0, "removed")
    assert (new.name, new.kind, new.macs_before, new.macs_after, new.note) == ("a.1", "conv 1x1", 0, 7, "new")
