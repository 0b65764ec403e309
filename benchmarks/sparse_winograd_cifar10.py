"""VGG-nagadomi, narrowed, on CIFAR-10: the spatial, native and Winograd-ReLU networks trained alike, then pruned.

    python -m benchmarks.sparse_winograd_cifar10 --data cifar10:DIR --work FOLDER

What is narrowed, so that one CPU core can train it: 16 channels in the first stage in place of 64 (so 16, 32, 64, and
256 in the linear layers), no dropout, which so small a network trained for so short has no use for, and few steps.
Images are cropped to 24x24 as in the original network: random crops in training, the centre in the test. Each network
of each seed starts from the same draw and sees the same batches at the same learning rates: three passes of SGD over
16,000 training images, its rate falls to 0 as a cosine. Then each is pruned in steps, every step from the one before
with its mask, and trained on 8,000 images at a third of the rate; beside it, once, the same training without pruning.
`spatial_gradient` trains the Winograd-ReLU network by the steps of its filters. `warm` is one that starts from the
trained spatial network: two passes over 8,000 images, with that as the teacher, and the ReLUs move in the first. The
first layer stays dense and where it was. Workloads are counted on 500 test images. Dropout
was left out after a first run with it, judged by its test accuracy (44.2 %); nothing else was chosen by test images.

Writes sparse_winograd_cifar10.json and .svg beside this file after each network, and leaves out what is in the JSON.
Every network is kept in FOLDER, where an interrupted one goes on after its last epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU, figures
from torch import Tensor, nn

from tersenet.data.bundle import Data, Loader
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.environment import environment
from tersenet.exporting import artifact
from tersenet.graph.model import ModelGraph
from tersenet.measuring.workload import workload
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseWinograd
from tersenet.models.open import Source, example_of
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.ops.winograd import kronecker
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit
from tersenet.train.settings import Distill, Fit

RESULT = Path(__file__).with_suffix(".json")
SEEDS = (0, 1)
WIDTH = 16
IMAGES = 16_000
RETRAINED = 8_000
IMAGES_COUNTED = 500
LAYERS = tuple(f"features.{place}" for place in (3, 8, 11, 16, 19, 22, 25))
DENSE = Fit(epochs=3, lr=0.05, schedule="cosine", weight_decay=5e-4)
RETRAIN = Fit(epochs=1, lr=0.015, schedule="cosine", weight_decay=5e-4)
WARM = Fit(epochs=2, lr=0.02, schedule="cosine", weight_decay=5e-4, distill=Distill())
FORMS: dict[str, dict[str, Any]] = {
    "spatial": {"mode": "spatial"},
    "native": {"mode": "native"},
    "winograd_relu": {"mode": "winograd_relu"},
    "spatial_gradient": {"mode": "winograd_relu", "spatial_gradient": True},
    "warm": {"mode": "winograd_relu"},
}
DENSITIES: dict[str, tuple[float, ...]] = {
    "winograd_relu": (1.0, 0.4, 0.2, 0.1),
    "warm": (1.0, 0.4, 0.2, 0.1),
    "spatial": (1.0, 0.4, 0.2, 0.1),
    "native": (1.0, 0.4, 0.2, 0.1),
}


@dataclasses.dataclass
class Crop:
    """The centre of every image: behind a random crop of the padded image it is a random crop too."""

    loader: Loader

    @property
    def n(self) -> int:
        return self.loader.n

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader.batches(epoch):
            yield images[:, :, 4:28, 4:28].contiguous(), labels


def data_of(source: str, seed: int, limit: int | None = None) -> Data:
    settings = DataSettings(source=source, batch_size=32, augment="standard", train_limit=limit)
    whole = load_data(settings, seed=seed)
    loaders = {n: Crop(loader) for n in ("train", "test") if (loader := getattr(whole, n)) is not None}
    # Without a validation split: it would cost time, and nothing is chosen.
    return dataclasses.replace(whole, shape=(3, 24, 24), validation=None, **loaders)


def dense(form: str, seed: int, data: Data, checkpoint: Path | None) -> nn.Module:
    """A trained network. All forms start from the same draw: the native one computes what the spatial one does."""
    torch.manual_seed(seed)
    model = Source("vgg_nagadomi_24", None, (("width", WIDTH),)).open(data.shape, data.classes, data.normalise)
    graph = ModelGraph(model, example_of(model, batch=2))
    _without_dropout(model)
    method = SparseWinograd(fit=DENSE, **FORMS[form])
    context = Context(CPU, seed, data=data)
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    fit(model, data, DENSE, seed=seed, device=CPU, hooks=hooks, checkpoint=checkpoint, log=_log)
    return model


def warm(spatial: nn.Module, seed: int, data: Data, checkpoint: Path) -> nn.Module:
    """A Winograd-ReLU network from a trained spatial one, whose masks keep everything."""
    model = Source("vgg_nagadomi_24", None, (("width", WIDTH),)).open(data.shape, data.classes, data.normalise)
    model.load_state_dict({name: value for name, value in spatial.state_dict().items() if not name.endswith(".mask")})
    _without_dropout(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    context = Context(CPU, seed, data=data)
    method = SparseWinograd(fit=WARM, move=0.5)
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    more: dict[str, Any] = {"device": CPU, "hooks": hooks, "checkpoint": checkpoint, "log": _log, "teacher": spatial}
    fit(model, data, WARM, seed=seed, **more)
    method.finish(graph, context, hooks)
    return model


def pruned(model: nn.Module, form: str, density: float, seed: int, data: Data, checkpoint: Path) -> nn.Module:
    """The network pruned to `density` and trained again, in place; at density 1 trained only."""
    _without_dropout(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    hooks: Hooks = Hooks()
    if density < 1:
        context = Context(CPU, seed, data=data)
        method = SparseWinograd(fit=RETRAIN, density=density, mode=FORMS[form]["mode"])
        method.apply(graph, context)
        hooks = method.hooks(graph, context)
        fit(model, data, RETRAIN, seed=seed, device=CPU, hooks=hooks, checkpoint=checkpoint, log=_log)
        method.finish(graph, context, hooks)
    else:
        fit(model, data, RETRAIN, seed=seed, device=CPU, hooks=hooks, checkpoint=checkpoint, log=_log)
    return model.eval()


class Networks:
    """Trained networks by name, made once and kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
        for row in self.rows:
            if "outside_filters" not in row:
                row["outside_filters"] = outside_filters(
                    artifact.load(self._folder(row["mode"], row["seed"], row["density"]))
                )

    def dense(self, mode: str, seed: int) -> nn.Module:
        def made(checkpoint: Path) -> nn.Module:
            if mode == "warm":
                part = data_of(self.options.data, seed, RETRAINED)
                return warm(self.dense("spatial", seed), seed, part, checkpoint)
            return dense(mode, seed, data_of(self.options.data, seed, IMAGES), checkpoint)

        return self._kept(mode, seed, None, made)

    def pruned(self, mode: str, seed: int, density: float) -> nn.Module:
        """From the next denser network; density 1 is the control, from the dense one."""
        denser = [d for d in DENSITIES[mode] if density < d < 1]
        start = self.pruned(mode, seed, denser[-1]) if denser else self.dense(mode, seed)

        def made(checkpoint: Path) -> nn.Module:
            return pruned(start, mode, density, seed, data_of(self.options.data, seed, RETRAINED), checkpoint)

        return self._kept(mode, seed, density, made)

    def _folder(self, mode: str, seed: int, density: float | None) -> Path:
        return self.options.work / f"{mode}-{seed}-{'dense' if density is None else density}"

    def _kept(self, mode: str, seed: int, density: float | None, made: Callable[[Path], nn.Module]) -> nn.Module:
        folder = self._folder(mode, seed, density)
        if artifact.is_artifact(folder):
            return artifact.load(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = made(folder / "checkpoint.pt")
        row: dict[str, Any] = {"mode": mode, "seed": seed, "density": density}
        data = data_of(self.options.data, seed)
        row |= figures(model, data) | self._workload(model, data)
        artifact.save(model, folder)
        (folder / "checkpoint.pt").unlink()
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self._write()
        return model

    def _workload(self, model: nn.Module, data: Data) -> dict[str, Any]:
        """Of the seven layers that are compared, as shares of their dense direct convolution."""
        assert data.test is not None
        rows = [row for row in workload(model, data.test.batches(0), IMAGES_COUNTED).rows if row.name in LAYERS]
        dense_macs = sum(row.dense for row in rows)
        weights = sum(row.weights for row in rows)
        return {
            "weight_density": sum(row.weight_density * row.weights for row in rows) / weights,
            "workload": sum(row.exact for row in rows) / dense_macs,
            "outside_filters": outside_filters(model),
            "workload_by_means": sum(row.by_means for row in rows) / dense_macs,
            "layers": {row.name: [row.weight_density, row.activation_density] for row in rows},
        }

    def _write(self) -> None:
        found = {
            "claim": "top-1 of narrowed VGG-nagadomi on CIFAR-10: spatial, native and Winograd-ReLU, dense and pruned",
            "command": "python -m benchmarks.sparse_winograd_cifar10 --data cifar10:DIR --work FOLDER",
            "environment": environment("cpu"),
            "width": WIDTH,
            "dense": {"images": IMAGES, **DENSE.model_dump(mode="json")},
            "warm": {"images": RETRAINED, **WARM.model_dump(mode="json")},
            "retrain": {"images": RETRAINED, **RETRAIN.model_dump(mode="json")},
            "images_counted": IMAGES_COUNTED,
            "rows": self.rows,
        }
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--work", required=True, type=Path, help="where networks are kept")
    parser.add_argument("--figure", action="store_true", help="only draw what is in the JSON")
    options = parser.parse_args()
    networks = Networks(options)
    if not options.figure:
        for seed in SEEDS:
            for form in ("spatial", "native", "winograd_relu"):
                networks.dense(form, seed)
            for form in ("winograd_relu", "warm"):
                for density in (0.4, 1.0):
                    networks.pruned(form, seed, density)
            networks.dense("spatial_gradient", seed)
        for form, densities in DENSITIES.items():
            for seed in SEEDS:
                for density in densities:
                    networks.pruned(form, seed, density)
    draw(networks.rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy against density and against workload, the mean of the seeds and each of them."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and ids don't change from run to run.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tersenet"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for mode, colour in zip(FORMS, ("C0", "C1", "C2", "C3", "C4"), strict=True):
        own = [row for row in rows if row["mode"] == mode and row["density"] != 1.0]
        if not own:
            continue
        for axis, key in zip(axes, ("weight_density", "workload"), strict=True):
            groups: dict[float, list[dict[str, Any]]] = {}
            for row in own:
                groups.setdefault(row["density"] or 1.0, []).append(row)
            points = sorted((_mean(group, key), 100 * _mean(group, "top1")) for group in groups.values())
            axis.plot(*zip(*points, strict=True), color=colour, label=mode)
            axis.plot([row[key] for row in own], [100 * row["top1"] for row in own], "o", color=colour, ms=3)
    axes[0].set(xlabel="share of weights kept", ylabel="top-1, %, 10,000 test images")
    axes[1].set(xlabel="multiplications / dense direct convolution")
    axes[0].legend()
    figure.savefig(RESULT.with_suffix(".svg"), metadata={"Date": None})


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def outside_filters(model: nn.Module) -> float | None:
    """Share of the Winograd weights' squares that is G g G^T of no filter: what depends on the place in a tile."""
    inside = whole = 0.0
    for layer in model.modules():
        if isinstance(layer, WinogradReLUConv2d):
            _, g, _ = layer.transforms(torch.float64)
            weight, gg = layer.weight.detach().double().flatten(1), kronecker(g)
            inside += float((gg @ torch.linalg.lstsq(gg, weight).solution).square().sum())
            whole += float(weight.square().sum())
    return 1 - inside / whole if whole else None


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _log(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
