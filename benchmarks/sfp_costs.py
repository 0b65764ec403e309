"""What soft filter pruning itself costs: its share of an epoch, compaction, the trace of every built-in network, and
what the compact ResNet-56 gains on the clock.

    python benchmarks/sfp_costs.py

Ratios and times of one run in one process, nothing else running. Writes sfp_costs.json beside this file.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersenet.environment import environment
from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import select_groups
from tersenet.measuring.latency import compare
from tersenet.methods.base import Context
from tersenet.methods.soft_filter_pruning import SoftFilterPruning
from tersenet.models.build import build
from tersenet.models.registry import ENTRIES
from tersenet.train.hooks import TrainState
from tersenet.train.settings import Fit

RATE = 0.4


def main() -> None:
    result = {
        "environment": environment("cpu"),
        "command": "python benchmarks/sfp_costs.py",
        "prune_step_share_of_epoch": {name: share_of_epoch(name) for name in ("resnet20", "resnet56")},
        "compaction_seconds": {
            f"{name} {residual}": compaction(name, residual)
            for name in ("resnet110", "vgg16", "vgg16_bn")
            for residual in ("independent", "coupled")
        },
        "resnet56_time_against_dense": {f"batch {batch}": time_against_dense(batch) for batch in (1, 64)},
        "trace_and_group_seconds": {name: trace_and_group(name) for name in ENTRIES},
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(path, file=sys.stderr)


def share_of_epoch(name: str, batch: int = 128, images: int = 50_000) -> dict[str, float]:
    """Seconds of one pruning step against those of an epoch, from interleaved prunes and training batches."""
    settings = SoftFilterPruning(fit=Fit(epochs=1), rate=RATE)
    model = build(name).to(memory_format=torch.channels_last)
    graph = ModelGraph(model, (torch.zeros(2, 3, 32, 32),))
    hooks = settings.hooks(graph, Context(device=torch.device("cpu"), seed=0))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, nesterov=True)
    state: Any = TrainState(model, None, optimizer, settings.fit, 0, 0, torch.device("cpu"), lambda: None)  # type: ignore[arg-type]
    inputs = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 10, (batch,))

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    steps: list[float] = []
    prunes: list[float] = []
    for _ in range(6):
        steps.append(seconds(train))
        prunes.append(seconds(lambda: hooks.prune(state, done=1)))
    epoch = statistics.median(steps[1:]) * images / batch
    prune = statistics.median(prunes[1:])
    return {"share": prune / (epoch + prune), "prune_seconds": prune, "epoch_seconds": epoch, "batches_timed": 5}


def compaction(name: str, residual: Any) -> float:
    """Seconds from a masked network to the compact one, checked for equality; tracing is not counted."""
    entry = ENTRIES[name]
    model = build(name).eval()
    graph = ModelGraph(model, (torch.zeros(1, *entry.input_shape),), residual)
    groups = [g for g in graph.groups if not g.frozen and all(t.dim() > 2 for t, _, _ in graph.filters(g))]
    kept = {g.name: np.arange(g.size - int(g.size * RATE)) for g in groups}
    return seconds(lambda: compact(graph, kept))


def time_against_dense(batch: int, rounds: int = 15) -> dict[str, Any]:
    """Forward time of compact networks divided by the dense one's: medians of one interleaved run, one thread."""
    torch.manual_seed(0)
    dense = build("resnet56").eval()
    for module in dense.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Random statistics: otherwise the removed filters' constants would be zero and cost nothing.
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.normal_(module.bias, std=0.3)
    networks = {"dense": dense}
    macs: dict[str, float] = {}
    for residual in ("independent", "coupled"):
        for constants in ("exact", "zero"):
            graph = ModelGraph(copy.deepcopy(dense), (torch.zeros(2, 3, 32, 32),), residual)
            whole = graph.macs()
            groups = select_groups(graph, ["*"], [])
            compact(graph, {g.name: np.arange(g.size - int(g.size * RATE)) for g in groups}, constants)
            networks[f"{residual} {constants}"] = graph.model
            macs[f"{residual} {constants}"] = graph.macs() / whole
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = compare(networks, torch.randn(batch, 3, 32, 32), runs=rounds)
    torch.set_num_threads(threads)
    base = times["dense"].median_ms
    ratios = {name: {"time": times[name].median_ms / base, "macs": share} for name, share in macs.items()}
    return {"threads": 1, "rounds": rounds, "dense_ms": base, **ratios}


def trace_and_group(name: str) -> float:
    """Seconds from a network to its channel groups."""
    model = build(name).eval()
    graph = ModelGraph(model, (torch.zeros(2, *ENTRIES[name].input_shape),))
    return seconds(lambda: graph.groups)


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
