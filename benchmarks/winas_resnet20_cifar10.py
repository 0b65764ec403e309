"""Tile and bits of ResNet-20's layers: the differentiable search beside the knapsack, under one latency table.

    python -m benchmarks.winas_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

The table is measured first (one thread, one image), and kept beside this file. The search sees `--train-limit` training
images once, at two weights of latency; the knapsack gets the very latency that each search chose, so that both are
compared at one cost. Candidates are direct, F2, F4 and F6 in floating point (the paper's WA search), and at 16 and 8
bits too (WA-Q). What is chosen is adapted on as many images, and evaluated before and after on the 10,000 test images.
Writes winas_resnet20_cifar10.json beside this file after each row, and leaves out rows that are in it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU, described, figures, opened, parser_of
from torch import nn

from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.winas import Winas, WinogradKnapsack
from tersenet.models.open import example_of
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit
from tersenet.train.settings import Fit
from tersenet.winograd_search.layers import measured

RESULT = Path(__file__).with_suffix(".json")
TABLE = RESULT.with_name("winas_latency_table.json")
BITS: dict[str, tuple[int | None, ...]] = {"WA": (None,), "WA-Q": (None, 16, 8)}
WEIGHTS = (0.1, 1.0)
TRAINING = {"epochs": 1, "optimizer": "adam", "lr": 2e-4, "schedule": "cosine", "weight_decay": 0.0}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--train-limit", type=int, default=12_800)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, data = opened("resnet20", options)
    limited = DataSettings(source=options.data, batch_size=128, train_limit=options.train_limit)
    part = load_data(limited, seed=0, normalise=data.normalise)
    if not TABLE.is_file():
        measured(model, example_of(model, batch=2), BITS["WA-Q"], batch=1).save(TABLE)
    claim = "tile and bits of ResNet-20's layers by differentiable search and by knapsack, at the same latency"
    result: dict[str, Any] = described(claim, __file__, options) | {"start": figures(model, data), "rows": []}
    result["rows"] = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    for name, bits in BITS.items():
        for weight in WEIGHTS:
            row = {"search": name, "latency_weight": weight, "train_images": options.train_limit}
            if any(row.items() <= known.items() for known in result["rows"]):
                continue
            network, notes, share = searched(model, part, bits, weight)
            row["winas"] = {"share": share, "choices": notes, **adapted(network, part, data)}
            network, notes = by_knapsack(model, part, bits, share)
            row["knapsack"] = {"choices": notes, **adapted(network, part, data)}
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")


def searched(
    model: nn.Module, part: Data, bits: tuple[int | None, ...], weight: float
) -> tuple[nn.Module, list[str], float]:
    """The network, the choices, and the share of the latency that is left."""
    model = copy.deepcopy(model)
    graph, context = ModelGraph(model, example_of(model, batch=2)), Context(CPU, 0, data=part)
    method = Winas(fit=Fit.model_validate(TRAINING), bits=bits, latency=str(TABLE), latency_weight=weight)
    method.apply(graph, context)
    hooks: Any = method.hooks(graph, context)
    rows = train(model, part, method.fit, hooks)
    method.finish(graph, context, hooks)
    return model, context.notes, rows[-1]["chosen_latency"]


def by_knapsack(
    model: nn.Module, part: Data, bits: tuple[int | None, ...], share: float
) -> tuple[nn.Module, list[str]]:
    model = copy.deepcopy(model)
    graph, context = ModelGraph(model, example_of(model, batch=2)), Context(CPU, 0, data=part)
    # A hair more, for sums in another order.
    method = WinogradKnapsack(bits=bits, latency=str(TABLE), share=min(1.0, share * (1 + 1e-6)))
    method.apply(graph, context)
    return model, context.notes


def adapted(model: nn.Module, part: Data, data: Data) -> dict[str, Any]:
    """Top-1 before and after training."""
    before = figures(model, data)
    train(model, dataclasses.replace(part, validation=None), Fit.model_validate(TRAINING), Hooks())
    return {"before": before, "after": figures(model, data)}


def train(model: nn.Module, part: Data, settings: Fit, hooks: Hooks) -> list[dict[str, Any]]:
    return fit(model, part, settings, seed=0, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)


if __name__ == "__main__":
    main()
