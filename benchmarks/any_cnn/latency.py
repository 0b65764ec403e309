"""Time of the pruned network beside the whole one: batch 1, one thread, float32, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.any_cnn.ours import weakest_removed
from benchmarks.any_cnn.subjects import build
from torch import nn

from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph

SECONDS, LEAST, MOST = 20.0, 5, 50


def prune(name: str) -> Iterator[dict[str, Any]]:
    whole, pruned = build(name), build(name)
    graph = ModelGraph(pruned.model, pruned.example(pruned.small))
    compact(graph, weakest_removed(graph), constants="auto")
    models = [whole.model.float(), pruned.model.float()]
    example = whole.example(whole.size)
    times: list[list[float]] = [[], []]
    began = time.perf_counter()
    _turn(models, example)
    while len(times[0]) < LEAST or (len(times[0]) < MOST and time.perf_counter() - began < SECONDS):
        for both, seconds in zip(times, _turn(models, example), strict=True):
            both.append(seconds)
    before, after = (statistics.median(both) * 1000 for both in times)
    yield {"before_ms": before, "after_ms": after, "ratio": after / before, "rounds": len(times[0]), "result": "ok"}


@torch.inference_mode()
def _turn(models: list[nn.Module], example: tuple[Any, ...]) -> list[float]:
    seconds: list[float] = []
    for model in models:
        began = time.perf_counter()
        model(*example)
        seconds.append(time.perf_counter() - began)
    return seconds
