"""A trained ResNet-20 with its convolutions swapped for Winograd ones, calibrated and not trained.

    python benchmarks/winograd_resnet20_cifar10.py --data cifar10:DIR --weights resnet20-12fca82f.th

For direct convolutions, F2 and F4, at 8 bits, with the paper's quantizers (one scale per tensor) and with one scale per
tap: ranges from 8 training batches of 128, then the 10,000 test images. The first layer and those with a stride are as
the method leaves them by default. Writes winograd_resnet20_cifar10.json beside this file.
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
from tersenet.methods.winograd_aware import WinogradSwap
from tersenet.models.open import Source, example_of
from tersenet.train.evaluate import evaluate

CPU = torch.device("cpu")
RESULT = Path(__file__).with_suffix(".json")
# Killed, it goes on behind the last row that was finished.
PARTIAL = RESULT.with_suffix(".partial.json")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"tile": 4, "bits": None},
    {"tile": "direct"},
    {"tile": 2, "quantizers": "reference"},
    {"tile": 2, "quantizers": "tapwise"},
    {"tile": 4, "quantizers": "reference"},
    {"tile": 4, "quantizers": "tapwise"},
    {"tile": 4, "quantizers": "tapwise", "product_bits": 10},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    options = parser.parse_args()
    source = Source("resnet20", options.weights)
    data = load_data(DataSettings(source=options.data, batch_size=128), seed=0, normalise=source.normalise)
    model = source.open(data.shape, data.classes, data.normalise)
    rows: list[dict[str, Any]] = json.loads(PARTIAL.read_text()) if PARTIAL.is_file() else []
    done = [row["settings"] for row in rows]
    for settings in SETTINGS:
        if settings not in done:
            rows.append({"settings": settings} | swapped(model, data, settings))
            print(rows[-1], flush=True)
            PARTIAL.write_text(json.dumps(rows))
    result = {
        "claim": "accuracy of ResNet-20 on CIFAR-10 right after the swap and calibration, no training",
        "runs_each": 1,
        "start": figures(model, data),
        "rows": rows,
        "environment": environment("cpu"),
        "command": "python benchmarks/winograd_resnet20_cifar10.py --data cifar10:DIR --weights resnet20-12fca82f.th",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PARTIAL.unlink()


def swapped(model: nn.Module, data: Data, settings: dict[str, Any]) -> dict[str, Any]:
    model = copy.deepcopy(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    context = Context(CPU, 0, None, graph.macs(), graph.params(), data)
    WinogradSwap.model_validate(settings).apply(graph, context)
    return figures(model, data)


def figures(model: nn.Module, data: Data) -> dict[str, Any]:
    assert data.test is not None
    accuracy = evaluate(model, data.test, device=CPU)
    return {"top1": accuracy.top1, "correct": accuracy.correct, "n": accuracy.n}


if __name__ == "__main__":
    main()
