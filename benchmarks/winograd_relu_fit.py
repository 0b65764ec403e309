"""How nearly a Winograd-domain layer can do what the spatial layer of a trained network does, before any training.

    python -m benchmarks.winograd_relu_fit --data cifar10:DIR --work FOLDER

FOLDER is that of sparse_winograd_cifar10.py: the layers are those of its spatial network of seed 0. For each of the
seven, the free weight of the Winograd domain (16 numbers for each pair of channels) is fitted by least squares to the
layer's outputs on 500 training images, from its own inputs as they are before their ReLU. Judged on 500 other training
images, as the share of the outputs' variance that is met, beside the share of activations that are not zero:

    winograd_relu   ReLU(B^T d B), the paper's layer
    linear          B^T d B: no ReLU anywhere
    one_sided       ReLU(B^T d B) with the points 0, -1/2, -2, whose B^T has no negative entry
    native          B^T ReLU(d) B
    zeros_T         B^T ReLU(d) B, where numbers up to T are set to zero

And the top-1, on the test images, of the spatial networks of both seeds whose seven layers become native ones with such
zeros, as they are, without a fit or any training. Writes winograd_relu_fit.json beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU
from benchmarks.sparse_winograd_cifar10 import LAYERS, SEEDS, data_of
from torch import Tensor, nn
from torch.nn.functional import hardshrink

from tersenet import atomic
from tersenet.environment import environment
from tersenet.exporting import artifact
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings
from tersenet.ops.winograd import kronecker
from tersenet.ops.winograd_relu import Activation
from tersenet.ops.winograd_tiles import output_image_adjoint
from tersenet.train.evaluate import evaluate

RESULT = Path(__file__).with_suffix(".json")
IMAGES = 500
THRESHOLDS = (0.25, 0.5, 1.0)
RIDGE = 1e-5
"""Of each unknown's own sum of squares."""


class Form:
    """One way from the inputs z (N, C, H, W) of a layer, before their ReLU, to V (16, P, C)."""

    def __init__(self, points: Any, relu: str, threshold: float = 0.0) -> None:
        self.settings = WinogradReLUSettings(points=points)
        self.relu, self.threshold = relu, threshold

    def taps(self, layer: WinogradReLUConv2d, z: Tensor) -> Tensor:
        v = layer.transformed(z.relu() if self.relu == "before" else z, Activation(self.relu == "behind"))
        return hardshrink(v, self.threshold) if self.threshold else v


FORMS: dict[str, Form] = {
    "winograd_relu": Form("reference", "behind"),
    "linear": Form("reference", "nowhere"),
    "one_sided": Form(("0", "-1/2", "-2"), "behind"),
    "native": Form("reference", "before"),
    **{f"zeros_{threshold:g}": Form("reference", "before", threshold) for threshold in THRESHOLDS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--work", required=True, type=Path, help="the folder of sparse_winograd_cifar10.py")
    options = parser.parse_args()
    model = artifact.load(options.work / "spatial-0-dense").eval()
    data = data_of(options.data, 0)
    assert data.train is not None
    images = torch.cat([x for (x, _), _ in zip(data.train.batches(0), range(-(-2 * IMAGES // 128)), strict=False)])
    rows: list[dict[str, Any]] = []
    for name in LAYERS:
        z, y = seen(model, name, images[: 2 * IMAGES])
        for form, how in FORMS.items():
            rows.append({"layer": name, "form": form, **fitted(model.get_submodule(name), how, z, y)})
            print(json.dumps(rows[-1]), flush=True)
    whole = [converted(options, seed, threshold) for seed in SEEDS for threshold in THRESHOLDS]
    found = {
        "claim": "share of a trained spatial layer's outputs that a Winograd-domain layer meets, by least squares",
        "command": "python -m benchmarks.winograd_relu_fit --data cifar10:DIR --work FOLDER",
        "environment": environment("cpu"),
        "images": IMAGES,
        "means": {form: mean([row for row in rows if row["form"] == form]) for form in FORMS},
        "rows": rows,
        "networks": whole,
    }
    atomic.write_text(RESULT, json.dumps(found, indent=1) + "\n")


def converted(options: argparse.Namespace, seed: int, threshold: float) -> dict[str, float | None]:
    """The whole network, native with these zeros."""
    model, data = artifact.load(options.work / f"spatial-{seed}-dense"), data_of(options.data, seed)
    assert data.test is not None
    features, settings = model.get_submodule("features"), WinogradReLUSettings(relu=False, threshold=threshold)
    assert isinstance(features, nn.Sequential)
    for name in LAYERS:
        place = int(name.split(".")[1])
        features[place] = WinogradReLUConv2d.from_conv(plain(features[place]), settings)
    model.eval()
    row: dict[str, float | None] = {
        "seed": seed,
        "threshold": threshold,
        "top1": evaluate(model, data.test, device=CPU, loss=data.loss).top1,
    }
    print(json.dumps(row), flush=True)
    return row


def plain(conv: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)
    made = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    made.load_state_dict({"weight": conv.weight})
    return made


@torch.no_grad()
def seen(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer reads, as it is before its ReLU, and what it makes of that; a max pool changes nothing there."""
    place = int(name.split(".")[1])
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    before = list(features.children())[:place]
    last = max(at for at, part in enumerate(before) if isinstance(part, nn.ReLU))
    parts: list[tuple[Tensor, Tensor]] = []
    for x in images.split(125):
        z = nn.Sequential(*before[:last], *before[last + 1 :])(x)
        parts.append((z, features[place](z.relu())))
    z, y = (torch.cat(part) for part in zip(*parts, strict=True))
    return z, y


@torch.no_grad()
def fitted(conv: nn.Module, how: Form, z: Tensor, y: Tensor) -> dict[str, float]:
    """The share of the variance that is met on the second half of the images, fitted to the first."""
    plain = nn.Conv2d(z.shape[1], y.shape[1], 3, padding=1, bias=False)
    layer = WinogradReLUConv2d.from_conv(plain, how.settings)
    mean_y = y[:IMAGES].mean((0, 2, 3), keepdim=True)
    layer.weight.copy_(least_squares(layer, how, z[:IMAGES], y[:IMAGES] - mean_y))
    aa = kronecker(layer.transforms(torch.float32)[0])
    errors: list[Tensor] = []
    kept: list[float] = []
    for part, wanted in zip(z[IMAGES:].split(125), y[IMAGES:].split(125), strict=True):
        v = how.taps(layer, part)
        made = aa @ torch.bmm(v, layer.weight).flatten(1)
        tiles = output_image_adjoint(wanted, layer.geometry, *part.shape[2:]).flatten(0, 1).flatten(1, -2)
        errors.append((made.view(tiles.shape) - tiles).flatten(0, 1))
        kept.append(float(v.ne(0).float().mean()))
    error = torch.cat(errors)
    variance = (y[IMAGES:] - y[IMAGES:].mean((0, 2, 3), keepdim=True)).square().sum()
    met = 1 - float((error - error.mean(0)).square().sum() / variance)
    return {"met": met, "activations": sum(kept) / len(kept)}


def least_squares(layer: WinogradReLUConv2d, how: Form, z: Tensor, y: Tensor) -> Tensor:
    """W (16, C, K): of outputs without their mean, and with one constant for each of them beside W."""
    aa = kronecker(layer.transforms(torch.float32)[0])
    taps, channels, outputs = layer.weight.shape
    squares = torch.zeros(taps * channels, taps * channels, dtype=torch.float64)
    products = torch.zeros(taps, channels, outputs, dtype=torch.float64)
    sums, places = torch.zeros(taps, channels, dtype=torch.float64), 0
    for part, wanted in zip(z.split(125), y.split(125), strict=True):
        v = how.taps(layer, part)
        flat = v.transpose(0, 1).flatten(1)
        squares += (flat.t() @ flat).double()
        tiles = output_image_adjoint(wanted, layer.geometry, *part.shape[2:]).flatten(0, 1).flatten(1, -2)
        by_tap = (aa.t() @ tiles.flatten(1)).view(taps, -1, outputs)
        products += torch.bmm(v.transpose(1, 2), by_tap).double()
        sums += v.sum(1)
        places += 4 * v.shape[1]
    both = (aa.t() @ aa).double().repeat_interleave(channels, 0).repeat_interleave(channels, 1)
    constant = (aa.sum(0).double()[:, None] * sums).flatten()
    squares = squares * both - torch.outer(constant, constant) / places
    scale = squares.diagonal().clamp(min=1e-12).rsqrt()
    matrix = squares * scale[:, None] * scale + RIDGE * torch.eye(len(scale), dtype=torch.float64)
    solved = torch.linalg.solve(matrix, products.flatten(0, 1) * scale[:, None]) * scale[:, None]
    return solved.view(taps, channels, outputs)


def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in ("met", "activations")}


if __name__ == "__main__":
    main()
