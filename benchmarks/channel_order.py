"""What learning the order of channels costs: ResNet-50, one step beside POT's exact solver, and its share of an epoch.

    python -m benchmarks.channel_order

Needs POT (`pip install POT`). Nothing else should run; times that are compared come from one interleaved run. Writes
channel_order.json beside this file.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.environment import environment, installed
from tersenet.graph.grouping import kernel_norms
from tersenet.measuring.turns import in_turns
from tersenet.models.build import build
from tersenet.ops.channel_order import Order, Problem, improved_all
from tersenet.ops.group_levels import cost_matrix, group_counts

ROUNDS = 20
"""Alternations after an epoch."""
TURNS = 5
SECONDS = 1.0
"""Turns at least; more for small problems, until POT took about so long."""
STEPS = ((64, 64), (256, 256), (512, 512), (512, 2048), (2048, 512))
DECAY = 0.5


def main() -> None:
    torch.manual_seed(0)
    result = {
        "environment": {**environment("cpu"), "POT": installed("POT")},
        "command": "python -m benchmarks.channel_order",
        "resnet50": whole("resnet50"),
        "beside_pot": [beside_pot(*shape) for shape in STEPS],
        "share_of_epoch": {name: share_of_epoch(name) for name in ("resnet20", "resnet56")},
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(path, file=sys.stderr)


def problems(model: nn.Module) -> dict[str, Problem]:
    """Of every convolution that is not grouped already and does not read the image."""
    found: dict[str, Problem] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels > 3:
            found[name] = problem(kernel_norms(layer.weight))
    return found


def problem(S: Any) -> Problem:
    return Problem(S, group_counts(*S.shape), DECAY, Order.identity(*S.shape))


def whole(name: str) -> dict[str, Any]:
    """Seconds of `ROUNDS` alternations for all layers of a fresh network, in threads."""
    todo = problems(build(name))
    return {"layers": len(todo), "rounds": ROUNDS, "seconds": seconds(lambda: improved_all(todo, ROUNDS))}


def beside_pot(C_out: int, C_in: int) -> dict[str, Any]:
    """One step, the rows' best order for fixed columns: ours and POT's network simplex, both from the norms on, in
    turns. Both solvers use one thread; the product of matrices that makes POT's costs uses all that BLAS has."""
    emd: Any = importlib.import_module("ot").emd
    one = problem(np.random.default_rng(0).standard_normal((C_out, C_in)) ** 2)
    R, marginals = cost_matrix(C_out, C_in, one.counts, DECAY), np.full(C_out, 1 / C_out)

    def ours() -> float:
        return one.best_rows(one.start.columns)[1]

    def pot() -> float:
        cost = one.S @ R.T
        return float((emd(marginals, marginals, cost, numItermax=10**8) * cost).sum() * C_out)

    found = {"ours": ours(), "pot": pot()}
    turns = max(TURNS, round(SECONDS / seconds(pot)))
    times = in_turns({"ours": ours, "pot": pot}, turns)
    medians = {which: statistics.median(values) / 1e3 for which, values in times.items()}
    return {
        "shape": [C_out, C_in],
        "turns": turns,
        "seconds": medians,
        "pot_over_ours": medians["pot"] / medians["ours"],
        "objective_differs_by": abs(found["ours"] - found["pot"]) / found["pot"],
    }


def share_of_epoch(name: str, batch: int = 128, images: int = 50_000) -> dict[str, float]:
    """Seconds of the update after an epoch against those of the epoch, from interleaved updates and training steps."""
    model = build(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, nesterov=True)
    inputs = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 10, (batch,))

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    steps: list[float] = []
    updates: list[float] = []
    for _ in range(TURNS + 1):
        steps.append(seconds(train))
        updates.append(seconds(lambda: improved_all(problems(model), ROUNDS)))
    epoch, update = statistics.median(steps[1:]) * images / batch, statistics.median(updates[1:])
    return {"share": update / epoch, "update_seconds": update, "epoch_seconds": epoch, "turns": TURNS}


def seconds(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
