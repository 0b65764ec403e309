"""ResNet-50 with two thirds of its weights cut by learned groups: equal outputs, and what it gains in time.

    python -m benchmarks.structured_resnet50

Random weights, 224 x 224, batch 1: this is about equality and time, not accuracy. The dense network, the grouped one
and the grouped one with one order on each trunk run in turns on torch eager, ONNX Runtime and as lowered networks, on
one and on two threads; nothing else should run. Needs onnx, onnxscript and onnxruntime. Writes structured_resnet50.json
beside this file.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.cifar_resnet import CPU
from torch import nn

from tersenet.environment import environment, installed
from tersenet.graph.grouping import group_convolutions, mask_groups
from tersenet.graph.model import ModelGraph
from tersenet.graph.proof import compare
from tersenet.lowering.lower import lower
from tersenet.lowering.peers import PEERS, Runner
from tersenet.measuring.macs import count_macs, params_of
from tersenet.measuring.turns import warm_in_turns
from tersenet.methods.base import Context
from tersenet.methods.structured_sparsification import StructuredSparsification
from tersenet.models.build import build
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.train.settings import Fit

SPARSITY = 0.65
ROUNDS = 30
IMAGE = (1, 3, 224, 224)
TRUNKS: tuple[Literal["own", "shared"], ...] = ("own", "shared")
KINDS = ("eager", "onnxruntime", "lowered")


def main() -> None:
    torch.manual_seed(0)
    dense = build("resnet50").eval()
    networks, found = {"dense": dense}, dict[str, Any]()
    for trunks in TRUNKS:
        networks[trunks], found[trunks] = sparsified(dense, trunks)
    result = {
        "claim": "latency of a grouped ResNet-50 against the dense one, beside its multiply-adds",
        "environment": {**environment("cpu"), "onnxruntime": installed("onnxruntime")},
        "command": "python -m benchmarks.structured_resnet50",
        "sparsity": SPARSITY,
        **found,
        "latency": [timed(networks, threads) for threads in (1, 2)],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def sparsified(dense: nn.Module, trunks: Literal["own", "shared"]) -> tuple[nn.Module, dict[str, Any]]:
    """The grouped network, and how it compares with the masked one."""
    example = (torch.zeros(IMAGE),)
    graph = ModelGraph(copy.deepcopy(dense), example)
    method = StructuredSparsification(fit=Fit(epochs=6), sparsity=SPARSITY, trunks=trunks)
    hooks = method.hooks(graph, Context(device=CPU, seed=0))
    groupings = hooks.decide()
    mask_groups(hooks.graph, groupings)
    masked = copy.deepcopy(hooks.graph.model)
    group_convolutions(hooks.graph, groupings, method.fuse)
    grouped = hooks.graph.model.eval()
    shuffled = [m for m in grouped.modules() if isinstance(m, GroupShuffleConv2d)]
    return grouped, {
        "relative_difference_to_masked": compare(masked, grouped, example).relative,
        "macs_left": count_macs(grouped, example)[0] / count_macs(dense, example)[0],
        "params_left": params_of(grouped) / params_of(dense),
        "gathers": sum((m.gather is not None) + (m.scatter is not None) for m in shuffled),
        "grouped_layers": len(groupings),
    }


def timed(networks: dict[str, nn.Module], threads: int) -> dict[str, Any]:
    """Milliseconds of all on each runtime, in turns, and the largest relative errors of the outputs."""
    torch.set_num_threads(threads)
    inputs = (torch.randn(IMAGE),)
    runners: dict[str, Runner] = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        expected = {name: model(*inputs) for name, model in networks.items()}
        for name, model in networks.items():
            with torch.inference_mode(False):
                fast = lower(model, (torch.zeros(IMAGE),))
            runners[f"lowered {name}"] = lambda fast=fast: [fast(*inputs)]
            for peer in ("eager", "onnxruntime"):
                place = Path(folder) / f"{peer} {name}"
                place.mkdir()
                runners[f"{peer} {name}"] = PEERS[peer](model, inputs, threads, place, False)
        errors = {key: _error(run()[0], expected[key.split()[1]]) for key, run in runners.items()}
        times = {key: statistics.median(values) for key, values in warm_in_turns(runners, ROUNDS).items()}
    ratios = {
        f"{name}_over_dense": {kind: times[f"{kind} {name}"] / times[f"{kind} dense"] for kind in KINDS}
        for name in networks
        if name != "dense"
    }
    return {"threads": threads, "rounds": ROUNDS, "median_ms": times, **ratios, "errors": errors}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
