"""Where a Winograd-ReLU network loses accuracy: one seed, judged on training images that are kept apart.

    python -m benchmarks.winograd_relu_gap --data cifar10:DIR --work FOLDER

The networks, images and rates of sparse_winograd_cifar10.py, seed 10, judged on a tenth of the training images that is
kept apart; no test image has a part in it. Beside longer training and twice the width, what the layer computes is
changed in one place:

    centre  only tap (1, 1), the sum of the four pixels in a tile's middle, has a ReLU; the other 15 are linear
    both    the ReLU before the transform stays, and the one behind it comes on top; steps are those of filters

Writes winograd_relu_gap.json beside this file after each network, and leaves out what is in it; an interrupted network
goes on after its last epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.cifar_resnet import CPU
from benchmarks.sparse_winograd_cifar10 import BATCH, DENSE, Crop, without_dropout
from torch import Tensor, nn

from tersenet import atomic
from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.environment import environment
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseWinograd
from tersenet.models.open import Source, example_of
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.ops import winograd_relu
from tersenet.ops.winograd_passes import TorchPasses
from tersenet.ops.winograd_tiles import Geometry
from tersenet.train.evaluate import evaluate
from tersenet.train.loop import fit

RESULT = Path(__file__).with_suffix(".json")
SEED = 10
CENTRE = 5


@dataclasses.dataclass(frozen=True)
class Network:
    form: str
    width: int = 16
    passes: int = DENSE.epochs

    @property
    def settings(self) -> dict[str, Any]:
        mode = "winograd_relu" if self.form in ("centre", "both") else self.form
        return {"mode": mode, "spatial_gradient": self.form == "both"}


NETWORKS = (
    Network("spatial"),
    Network("winograd_relu"),
    Network("centre"),
    Network("both"),
    Network("winograd_relu", passes=20),
    Network("spatial", passes=20),
    Network("winograd_relu", width=32),
    Network("spatial", width=32),
)


class Centre(TorchPasses):
    """With a ReLU on one tap alone."""

    def taps(self, x: Tensor, relu: bool) -> Tensor:
        taps = super().taps(x, False)
        if relu:
            taps[CENTRE].clamp_(min=0)
        return taps

    def input_gradient(self, d_taps: Tensor, gate: Tensor | None, shape: torch.Size) -> Tensor:
        if gate is not None:
            d_taps[CENTRE] = torch.ops.aten.threshold_backward(d_taps[CENTRE], gate[CENTRE], 0)
        return super().input_gradient(d_taps, None, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--work", required=True, type=Path, help="where checkpoints are kept")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = data_of(options.data)
    for network in NETWORKS:
        place = dataclasses.asdict(network)
        if not any(place.items() <= row.items() for row in rows()):
            write([*rows(), place | trained(network, data, options.work)], data)


def data_of(source: str) -> Data:
    whole = load_data(DataSettings(source=source, batch_size=BATCH, augment="standard", validation=0.1), seed=SEED)
    assert whole.train is not None
    assert whole.validation is not None
    own = {"train": Crop(whole.train), "validation": Crop(whole.validation), "test": None}
    return dataclasses.replace(whole, shape=(3, 24, 24), **own)


def trained(network: Network, data: Data, work: Path) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = Source("vgg_nagadomi_24", None, (("width", network.width),)).open(data.shape, data.classes, data.normalise)
    without_dropout(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    settings = DENSE.model_copy(update={"epochs": network.passes})
    method, context = SparseWinograd(fit=settings, **network.settings), Context(CPU, SEED, data=data)
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    checkpoint = work / f"{network.form}-{network.width}-{network.passes}.pt"
    epochs: list[dict[str, Any]] = []

    def log(row: dict[str, Any]) -> None:
        if row["kind"] == "epoch":
            print(json.dumps(row), flush=True)
            epochs.append(row)

    with ExitStack() as stack:
        if network.form == "centre":
            stack.enter_context(mock.patch.object(winograd_relu, "passes_for", _centre))
        if network.form == "both":
            for layer in model.modules():
                if isinstance(layer, WinogradReLUConv2d):
                    stack.callback(layer.register_forward_pre_hook(_rectified).remove)
        fit(model, data, settings, seed=SEED, device=CPU, hooks=hooks, checkpoint=checkpoint, log=log)
        method.finish(graph, context, hooks)
        assert data.validation is not None
        found = evaluate(model, data.validation, device=CPU, loss=data.loss)
    checkpoint.unlink()
    return {"top1": found.top1, "n": data.validation.n, "train_top1": epochs[-1]["train_top1"] if epochs else None}


def _centre(x: Tensor, weight: Tensor, geometry: Geometry, aa: Tensor, bb: Tensor, exact: Any) -> Centre:
    return Centre(geometry, aa, bb)


def _rectified(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].relu(),)


def rows() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []


def write(found: list[dict[str, Any]], data: Data) -> None:
    assert data.train is not None
    result = {
        "claim": "top-1 of narrowed VGG-nagadomi on kept training images of CIFAR-10, by what the layer computes",
        "command": "python -m benchmarks.winograd_relu_gap --data cifar10:DIR --work FOLDER",
        "environment": environment("cpu"),
        "images": data.train.n,
        "batch": BATCH,
        "seed": SEED,
        "dense": DENSE.model_dump(mode="json"),
        "rows": found,
    }
    atomic.write_text(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
