"""What channel pruning leaves of a trained CIFAR ResNet without any training after it, beside its baselines.

    python benchmarks/channel_pruning_cifar10.py --model resnet56 --weights resnet56-4bfd9763.th --data cifar10:DIR

For 70 % and 50 % of the MACs: the whole method, the same with parts of it taken away, and `magnitude`; top-1 on the
10,000 test images, before any fine-tuning. Calibration takes 500 training images. Magnitude gets batch norm statistics
estimated anew on as many (4 batches); channel pruning needs none. Writes channel_pruning_MODEL_cifar10.json beside this
file after each row, and leaves out rows that are in it.
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
from tersenet.methods.base import Context, Method
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.magnitude import Magnitude
from tersenet.models.open import Source, example_of
from tersenet.recipe_target import Target
from tersenet.train.evaluate import evaluate

TARGETS = ("macs=50%", "macs=70%")
IMAGES = 500
ROWS: dict[str, Method] = {
    "LASSO, reconstruction": ChannelPruning(images=IMAGES),
    "LASSO, reconstruction, samplers": ChannelPruning(images=IMAGES, residual="independent"),
    "even rates: LASSO, reconstruction": ChannelPruning(images=IMAGES, allocate="uniform"),
    "even rates: max response, reconstruction": ChannelPruning(
        images=IMAGES, allocate="uniform", select="max_response"
    ),
    "even rates: first k, reconstruction": ChannelPruning(images=IMAGES, allocate="uniform", select="first"),
    "even rates: random, reconstruction": ChannelPruning(images=IMAGES, allocate="uniform", select="random"),
    "even rates: LASSO, no reconstruction": ChannelPruning(images=IMAGES, allocate="uniform", reconstruct=False),
    "even rates: LASSO, reconstruction, samplers": ChannelPruning(
        images=IMAGES, allocate="uniform", residual="independent"
    ),
    "magnitude l1, even rates": Magnitude(score="l1", recalibrate_bn=4),
    "magnitude l2, global": Magnitude(score="l2", scope="global", recalibrate_bn=4),
}
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--target", nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    source = Source(options.model, options.weights)
    data = load_data(DataSettings(source=options.data, batch_size=128), seed=0, normalise=source.normalise)
    model = source.open(data.shape, data.classes, data.normalise)
    path = Path(__file__).with_name(f"channel_pruning_{options.model}_cifar10.json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    result: dict[str, Any] = {
        "claim": f"accuracy of {options.model} on CIFAR-10 right after pruning, no training",
        "runs_each": 1,
        "start": figures(model, data),
        "rows": rows,
        "environment": environment("cpu"),
        "command": f"python benchmarks/channel_pruning_cifar10.py --model {options.model} "
        f"--weights {Path(options.weights).name} --data cifar10:DIR",
    }
    for target in options.target:
        for name in options.only:
            if any((row["target"], row["method"]) == (target, name) for row in rows):
                continue
            rows.append({"target": target, "method": name} | pruned(model, data, target, ROWS[name]))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "widths"}), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


def pruned(model: nn.Module, data: Data, target: str, method: Method) -> dict[str, Any]:
    model = copy.deepcopy(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    context = Context(CPU, 0, Target.parse(target), graph.macs(), graph.params(), data)
    whole = graph.macs()
    method.apply(graph, context)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    widths = {name: [layer.in_channels, layer.out_channels] for name, layer in layers.items()}
    return figures(model, data) | {"macs_left": ModelGraph(model, graph.example).macs() / whole, "widths": widths}


def figures(model: nn.Module, data: Data) -> dict[str, Any]:
    assert data.test is not None
    accuracy = evaluate(model, data.test, device=CPU)
    return {"top1": accuracy.top1, "correct": accuracy.correct, "n": accuracy.n}


if __name__ == "__main__":
    main()
