"""What each importance score leaves of a trained ResNet-20, without any training after it.

    python benchmarks/magnitude_resnet20_cifar10.py --data cifar10:DIR --weights resnet20-12fca82f.th

For both scopes and every score: prune to 70 % of the MACs, estimate batch norm statistics from 16 training batches,
evaluate on the 10,000 test images. Writes magnitude_resnet20_cifar10.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.environment import environment
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.magnitude import Magnitude
from tersenet.models.open import Source, example_of
from tersenet.recipe_target import Target
from tersenet.train.evaluate import evaluate

TARGETS = ("macs=70%",)
SCORES = ("l1", "l2", "fpgm", "bn_scale", "taylor", "activation", "apoz", "random")
CPU = torch.device("cpu")
RESULT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    options = parser.parse_args()
    source = Source("resnet20", options.weights)
    data = load_data(DataSettings(source=options.data, batch_size=128), seed=0, normalise=source.normalise)
    model = source.open(data.shape, data.classes, data.normalise)
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        for scope in ("local", "global"):
            for score in SCORES:
                rows.append(
                    {"target": target, "scope": scope, "score": score} | pruned(model, data, target, scope, score)
                )
                print(rows[-1], flush=True)
    result = {
        "claim": "accuracy of ResNet-20 on CIFAR-10 right after one-shot pruning, no training",
        "runs_each": 1,
        "start": figures(model, data),
        "rows": rows,
        "environment": environment("cpu"),
        "command": "python benchmarks/magnitude_resnet20_cifar10.py --data cifar10:DIR --weights resnet20-12fca82f.th",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def pruned(model: nn.Module, data: Data, target: str, scope: str, score: str) -> dict[str, Any]:
    model = copy.deepcopy(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    context = Context(CPU, 0, Target.parse(target), graph.macs(), graph.params(), data)
    settings = Magnitude.model_validate({"scope": scope, "score": score, "recalibrate_bn": 16})
    whole = graph.macs()
    settings.apply(graph, context)
    return figures(model, data) | {"macs_left": graph.macs() / whole}


def figures(model: nn.Module, data: Data) -> dict[str, Any]:
    assert data.test is not None
    accuracy = evaluate(model, data.test, device=CPU)
    return {"top1": accuracy.top1, "correct": accuracy.correct, "n": accuracy.n}


if __name__ == "__main__":
    main()
