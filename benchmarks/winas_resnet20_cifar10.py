"""Tile and bits of ResNet-20's layers: the differentiable search beside the knapsack, under one latency table.

    python -m benchmarks.winas_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

Two searches, each under a table of its own. WA, the paper's in floating point: direct, F2, F4 and F6, by times that are
measured here (one thread, one image, processor time). WA-Q: the same at 8 bits too, by the number of products, where
one of 8 bits counts a quarter. That is no machine's table: measured here, few bits are never faster, since no kernel
computes Winograd layers in integers, and the search would have nothing to weigh.

A search sees `--train-limit` training images once, in batches of 64; that is 32 steps of the weights and as many of the
logits, whose learning rate is raised for it. The knapsack gets the very cost that the search chose, so that both are
compared at the same. What each chose is evaluated on the first 5,000 test images, then adapted on as many training
images as the search saw, and evaluated again: the search's network has seen them twice by then.

Writes winas_resnet20_cifar10.json beside this file after each row, and leaves out rows that are in it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU, described, figures, opened, parser_of
from torch import nn

from tersenet.data.bundle import Data, Loader
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.graph.model import ModelGraph
from tersenet.measuring.layer_latency import LatencyTable, Row
from tersenet.methods.base import Context
from tersenet.methods.winas import Winas, WinogradKnapsack
from tersenet.models.open import example_of
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit
from tersenet.train.settings import Fit
from tersenet.winograd_search.layers import measured

RESULT = Path(__file__).with_suffix(".json")
SEARCHES: tuple[tuple[str, tuple[int | None, ...], str], ...] = (
    ("WA-Q", (None, 8), "products"),
    ("WA", (None,), "measured"),
)
"""Name, bits, and the table that counts."""
LATENCY_WEIGHT = 1.0
LOGITS_LR = 0.15
BATCHES = 2
"""Of 64 training images, for ranges and for the knapsack's sensitivities."""
TESTED = 20
"""Batches of 250 test images."""
TRAINING = {"epochs": 1, "optimizer": "adam", "lr": 2e-4, "schedule": "cosine", "weight_decay": 0.0}


@dataclasses.dataclass
class First:
    """The first batches of a loader."""

    loader: Loader
    count: int

    @property
    def n(self) -> int:
        return sum(len(labels) for _, labels in self.batches(0))

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        return itertools.islice(self.loader.batches(epoch), self.count)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--train-limit", type=int, default=2_048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, data = opened("resnet20", options)
    assert data.test is not None
    data = dataclasses.replace(data, test=First(data.test, TESTED))
    # The logits learn from the images that are kept apart.
    limited = DataSettings(source=options.data, batch_size=64, validation=2000, train_limit=options.train_limit)
    part = load_data(limited, seed=0, normalise=data.normalise)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if not result:
        table = measured(model, example_of(model, batch=2), (None, 8), batch=1)
        claim = "tile and bits of ResNet-20's layers by differentiable search and by knapsack, at the same cost"
        result = described(claim, __file__, options) | {
            "latency_weight": LATENCY_WEIGHT,
            "train_images": options.train_limit,
            "start": figures(model, data),
            "rows": [],
            "tables": {"measured": table.model_dump(mode="json"), "products": products(table).model_dump(mode="json")},
        }
    with tempfile.TemporaryDirectory() as folder:
        for name, bits, chosen in SEARCHES:
            if any(known["search"] == name for known in result["rows"]):
                continue
            where = Path(folder) / f"{chosen}.json"
            LatencyTable.model_validate_json(json.dumps(result["tables"][chosen])).save(where)
            network, notes, share = searched(model, part, bits, where)
            row: dict[str, Any] = {"search": name, "table": chosen, "share": share}
            row["winas"] = {"choices": notes, **adapted(network, part, data)}
            network, notes = by_knapsack(model, part, bits, share, where)
            row["knapsack"] = {"choices": notes, **adapted(network, part, data)}
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")


def products(table: LatencyTable) -> LatencyTable:
    """The same rows by their number of products, in millions, of 32 bits; transforms cost nothing."""
    rows: list[Row] = []
    for row in table.rows:
        shape, r = row.shape, row.shape.kernel[0]
        tiles = shape.map[0] * shape.map[1]
        each = r * r
        if row.tile != "direct":
            tiles = math.ceil(shape.map[0] / row.tile) * math.ceil(shape.map[1] / row.tile)
            each = (row.tile + r - 1) ** 2
        count = each * tiles * shape.in_channels * shape.out_channels // shape.groups
        rows.append(row.model_copy(update={"ms": count / 1e6 * (row.bits or 32) / 32, "kernel": "counted"}))
    machine = {"processor": "no machine: millions of products, of which four of 8 bits are one"}
    return LatencyTable(environment=machine, batch=1, threads=1, rows=tuple(rows))


def searched(
    model: nn.Module, part: Data, bits: tuple[int | None, ...], where: Path
) -> tuple[nn.Module, list[str], float]:
    """The network, the choices, and the share of the cost that is left."""
    model = copy.deepcopy(model)
    graph, context = ModelGraph(model, example_of(model, batch=2)), Context(CPU, 0, data=part)
    more: dict[str, Any] = {"latency": str(where), "calibration_batches": BATCHES}
    more |= {"latency_weight": LATENCY_WEIGHT, "logits_lr": LOGITS_LR}
    method = Winas(fit=Fit.model_validate(TRAINING), bits=bits, **more)
    method.apply(graph, context)
    hooks: Any = method.hooks(graph, context)
    rows = train(model, part, method.fit, hooks)
    method.finish(graph, context, hooks)
    return model, context.notes, rows[-1]["chosen_latency"]


def by_knapsack(
    model: nn.Module, part: Data, bits: tuple[int | None, ...], share: float, where: Path
) -> tuple[nn.Module, list[str]]:
    model = copy.deepcopy(model)
    graph, context = ModelGraph(model, example_of(model, batch=2)), Context(CPU, 0, data=part)
    # A hair more, for sums in another order.
    share = min(1.0, share * (1 + 1e-6))
    method = WinogradKnapsack(bits=bits, latency=str(where), share=share, calibration_batches=BATCHES)
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
