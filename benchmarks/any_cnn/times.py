"""Times, on a quiet machine: from the network to the pruned one with both tools, and a forward pass before and after.

Both tools do the same job here: the channels go with their norms' scales and biases (`constants="zero"`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.any_cnn.ours import weakest_removed
from benchmarks.any_cnn.peer import remove_half
from benchmarks.any_cnn.subjects import Subject, build
from torch import nn

from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph

FAST, ROUNDS = 1.5, 3
"""What takes less than `FAST` seconds is done `ROUNDS` times."""
SECONDS, LEAST, MOST = 2.0, 5, 50


def prune(name: str, peer: bool) -> Iterator[dict[str, Any]]:
    """Processor seconds of pruning, median of the rounds, in turns with Torch-Pruning if it can prune this network;
    and milliseconds of a forward pass: batch 1, one thread, float32, in turns."""
    tools = {"ours_s": _ours, **({"peer_s": remove_half} if peer else {})}
    rounds: list[dict[str, float]] = []
    while not rounds or (len(rounds) < ROUNDS and sum(rounds[0].values()) < FAST):
        subjects = {key: build(name) for key in tools}
        rounds.append({key: _seconds(tool, subjects[key]) for key, tool in tools.items()})
    yield {**{key: statistics.median(r[key] for r in rounds) for key in tools}, "rounds": len(rounds)}
    whole, pruned = build(name), subjects["ours_s"]
    models = [whole.model.float(), pruned.model.float()]
    example = whole.example(whole.size)
    times: list[list[float]] = [[], []]
    began = time.perf_counter()
    _turn(models, example)
    while len(times[0]) < LEAST or (len(times[0]) < MOST and time.perf_counter() - began < SECONDS):
        for both, seconds in zip(times, _turn(models, example), strict=True):
            both.append(seconds)
    before, after = (statistics.median(both) * 1000 for both in times)
    yield {"before_ms": before, "after_ms": after, "ratio": after / before, "passes": len(times[0]), "result": "ok"}


def _ours(subject: Subject) -> None:
    graph = ModelGraph(subject.model, subject.example(subject.small))
    compact(graph, weakest_removed(graph), constants="zero")


def _seconds(prune: Callable[[Subject], None], subject: Subject) -> float:
    began = time.process_time()
    prune(subject)
    return time.process_time() - began


@torch.inference_mode()
def _turn(models: list[nn.Module], example: tuple[Any, ...]) -> list[float]:
    seconds: list[float] = []
    for model in models:
        began = time.perf_counter()
        model(*example)
        seconds.append(time.perf_counter() - began)
    return seconds
