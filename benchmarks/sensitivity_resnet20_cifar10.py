"""Rates chosen layer by layer against the scopes of `magnitude`, on a trained ResNet-20, without any training after it.

    python benchmarks/sensitivity_resnet20_cifar10.py --data cifar10:DIR --weights resnet20-12fca82f.th

The analysis takes 1,000 validation images. For each allowed drop: `magnitude` with the rates that follow, and in both
of its scopes with at most as many MACs; batch norm statistics from 16 training batches; top-1 on the 10,000 test
images. Writes sensitivity_resnet20_cifar10.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

import tersenet as tn
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.environment import environment
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.magnitude import Magnitude
from tersenet.models.open import Source, example_of
from tersenet.recipe_target import Target
from tersenet.train.evaluate import evaluate

DROPS = (0.005, 0.01, 0.03)
CPU = torch.device("cpu")
RESULT = Path(__file__).with_suffix(".json")
CLAIM = (
    "ResNet-20 on CIFAR-10 right after one-shot pruning, rates by sensitivity against magnitude's scopes; no training"
)
COMMAND = "python benchmarks/sensitivity_resnet20_cifar10.py --data cifar10:DIR --weights resnet20-12fca82f.th"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", help="folder of the analysis, to go on with it")
    options = parser.parse_args()
    source = Source("resnet20", options.weights)
    data = load_data(DataSettings(source=options.data, batch_size=128), seed=0, normalise=source.normalise)
    model = source.open(data.shape, data.classes, data.normalise)
    assert data.test is not None
    macs = ModelGraph(model, example_of(model)).macs()

    def pruned(target: Target | None, **settings: Any) -> dict[str, Any]:
        network = copy.deepcopy(model)
        graph = ModelGraph(network, example_of(network, batch=2))
        context = Context(CPU, 0, target, original_macs=macs, data=data)
        Magnitude(recalibrate_bn=16, **settings).apply(graph, context)
        assert data.test is not None
        accuracy = evaluate(network, data.test, device=CPU)
        return {"macs": graph.macs() / macs, "correct": accuracy.correct, "n": accuracy.n, "top1": accuracy.top1}

    found = tn.sensitivity("resnet20", options.data, weights=options.weights, out=options.out, device="cpu")
    rows: list[dict[str, Any]] = []
    for drop in DROPS:
        rates = found.rates(max_drop=drop)
        chosen = pruned(None, rates=rates)
        target = Target.parse(f"macs={100 * chosen['macs']:.4f}%")
        same = {scope: pruned(target, scope=scope) for scope in ("local", "global")}
        rows.append({"max_drop": drop, "rates": rates, "chosen": chosen} | same)
        print(rows[-1], flush=True)
    whole = evaluate(model, data.test, device=CPU)
    result = {
        "claim": CLAIM,
        "runs_each": 1,
        "start": {"macs": macs, "correct": whole.correct, "n": whole.n},
        "baseline": found.baseline.model_dump(),
        "layers": [
            {
                "name": layer.name,
                "channels": layer.channels,
                "macs_share": layer.macs_share,
                "drops": {str(point.rate): found.drop(point) for point in layer.points},
            }
            for layer in found.layers
        ],
        "rows": rows,
        "environment": environment("cpu"),
        "command": COMMAND,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
