"""VGG-nagadomi, narrowed, on CIFAR-10: the spatial, native and Winograd-ReLU networks trained alike, then pruned.

    python -m benchmarks.sparse_winograd_cifar10 --data cifar10:DIR --work FOLDER [--seed 0]

What is narrowed, so that one CPU core can train it: 16 channels in the first stage in place of 64 (so 16, 32, 64, and
256 in the linear layers), no dropout, which so small a network trained for so short has no use for, and four passes
over 45,000 training images. Images are cropped to 24x24 as in the original network: random crops in training, the
centre in the test. All networks of a seed start from the same draw and see the same batches at the same learning rates.
The first layer stays dense and where it was.

`native_filters` is the native network trained by the steps of its filters (`spatial_gradient`), and `zeros_T` that with
activations up to T set to zero behind the input transform (`threshold`). `warm` is a Winograd-ReLU network that starts
from the trained spatial one, with that as the teacher: six passes more at half of the rate, and the ReLUs move in the
first quarter of them. `spatial_on`, `native_on` and `zeros_T_on` are the spatial network trained on in the same way, as
it is and with its seven layers as those of `native_filters` and `zeros_T`.
Then networks are pruned in steps, every step from the one before with its mask and with it as the teacher, and trained
for two passes at a fifth of the rate; density 1 is the same training without pruning. Workloads are counted on 500 test
images.

The recipe was chosen with another seed on 5,000 images kept apart from the training images; no test image had a part in
it, but for one thing: a threshold of 0.25 was tried because of what 0.5 had on the test images. Writes
sparse_winograd_cifar10.json and .svg beside this file after each network, and leaves out what is in the JSON. Every
network is kept in FOLDER, where an interrupted one goes on after its last epoch. Two seeds may run at once.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU, figures
from torch import Tensor, nn

from tersenet import atomic
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
from tersenet.train.loop import fit
from tersenet.train.settings import Distill, Fit

RESULT = Path(__file__).with_suffix(".json")
SEEDS = (0, 1)
WIDTH = 16
BATCH = 128
IMAGES_COUNTED = 500
LAYERS = tuple(f"features.{place}" for place in (3, 8, 11, 16, 19, 22, 25))
DENSE = Fit(epochs=4, lr=0.1, schedule="cosine", warmup_epochs=0.5)
WARM = Fit(epochs=6, lr=0.05, schedule="cosine", warmup_epochs=0.25, distill=Distill())
RETRAIN = Fit(epochs=2, lr=0.02, schedule="cosine", distill=Distill())
FORMS: dict[str, dict[str, Any]] = {
    "spatial": {"mode": "spatial"},
    "native": {"mode": "native"},
    "winograd_relu": {"mode": "winograd_relu"},
    "native_filters": {"mode": "native", "spatial_gradient": True},
    "zeros_0.25": {"mode": "native", "spatial_gradient": True, "threshold": 0.25},
    "zeros_0.5": {"mode": "native", "spatial_gradient": True, "threshold": 0.5},
    "warm": {"mode": "winograd_relu", "move": 0.25},
    "zeros_0.25_on": {"mode": "native", "spatial_gradient": True, "threshold": 0.25},
    "zeros_0.5_on": {"mode": "native", "spatial_gradient": True, "threshold": 0.5},
    "spatial_on": {"mode": "spatial"},
    "native_on": {"mode": "native", "spatial_gradient": True},
}
"""What is trained, by name."""
NETWORKS: tuple[tuple[str, float | None], ...] = (
    ("spatial", None),
    ("warm", None),
    ("warm", 0.4),
    ("winograd_relu", None),
    ("warm", 0.2),
    ("warm", 0.1),
    ("native_filters", None),
    ("native", None),
    ("spatial_on", None),
    ("warm", 1.0),
    ("zeros_0.25", None),
    ("zeros_0.5", None),
    ("zeros_0.25_on", None),
    ("zeros_0.5_on", None),
    ("zeros_0.25_on", 0.4),
    ("native_on", None),
)
"""In this order: (form, density); None is the dense network, 1 the one that was trained on without pruning."""


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


def data_of(source: str, seed: int) -> Data:
    settings = DataSettings(source=source, batch_size=BATCH, augment="standard")
    whole = load_data(settings, seed=seed)
    loaders = {n: Crop(loader) for n in ("train", "test") if (loader := getattr(whole, n)) is not None}
    # Without a validation split: it would cost time, and nothing is chosen.
    return dataclasses.replace(whole, shape=(3, 24, 24), validation=None, **loaders)


def trained(
    form: str, seed: int, data: Data, settings: Fit, checkpoint: Path, start: nn.Module | None = None
) -> nn.Module:
    """A dense network, from the draw that all forms start from or from a trained spatial one, which then teaches it."""
    torch.manual_seed(seed)
    model = Source("vgg_nagadomi_24", None, (("width", WIDTH),)).open(data.shape, data.classes, data.normalise)
    if start is not None:
        # Its masks keep everything.
        model.load_state_dict({name: value for name, value in start.state_dict().items() if not name.endswith(".mask")})
    without_dropout(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    method = SparseWinograd(fit=settings, **FORMS[form])
    context = Context(CPU, seed, data=data)
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    more: dict[str, Any] = {"device": CPU, "hooks": hooks, "checkpoint": checkpoint, "log": _log, "teacher": start}
    fit(model, data, settings, seed=seed, **more)
    method.finish(graph, context, hooks)
    return model


def pruned(model: nn.Module, form: str, density: float, seed: int, data: Data, checkpoint: Path) -> nn.Module:
    """The network pruned to `density` and trained again, in place; at density 1 trained only."""
    without_dropout(model)
    teacher = copy.deepcopy(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    context = Context(CPU, seed, data=data)
    method = SparseWinograd(fit=RETRAIN, density=density, mode=FORMS[form]["mode"])
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    more: dict[str, Any] = {"device": CPU, "hooks": hooks, "checkpoint": checkpoint, "log": _log, "teacher": teacher}
    fit(model, data, RETRAIN, seed=seed, **more)
    method.finish(graph, context, hooks)
    return model


class Networks:
    """Trained networks by name, made once and kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As they stand in the file now: another process may write rows of another seed."""
        return json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []

    def made(self, form: str, seed: int, density: float | None) -> nn.Module:
        """Dense (None), or pruned from the next denser one; density 1 is trained on from the dense one."""
        folder: Path = self.options.work / f"{form}-{seed}-{'dense' if density is None else density}"
        data = data_of(self.options.data, seed)
        if not artifact.is_artifact(folder):
            folder.mkdir(parents=True, exist_ok=True)
            model = self._train(form, seed, density, data, folder / "checkpoint.pt")
            artifact.save(model, folder)
            (folder / "checkpoint.pt").unlink()
        model = artifact.load(folder)
        place = {"mode": form, "seed": seed, "density": density}
        if not any(place.items() <= row.items() for row in self.rows):
            row = place | figures(model, data) | self._workload(model, data)
            print(json.dumps(row), flush=True)
            self._write([*self.rows, row], data)
        return model

    def _train(self, form: str, seed: int, density: float | None, data: Data, checkpoint: Path) -> nn.Module:
        if density is not None:
            denser = [d for f, d in NETWORKS if f == form and d is not None and density < d < 1]
            start = self.made(form, seed, min(denser) if denser else None)
            return pruned(start, form, density, seed, data, checkpoint)
        if form == "warm" or form.endswith("_on"):
            return trained(form, seed, data, WARM, checkpoint, self.made("spatial", seed, None))
        return trained(form, seed, data, DENSE, checkpoint)

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

    def _write(self, rows: list[dict[str, Any]], data: Data) -> None:
        assert data.train is not None
        recipes = {"dense": DENSE, "warm": WARM, "retrain": RETRAIN}
        found = {
            "claim": "top-1 of narrowed VGG-nagadomi on CIFAR-10: spatial, native and Winograd-ReLU, dense and pruned",
            "command": "python -m benchmarks.sparse_winograd_cifar10 --data cifar10:DIR --work FOLDER",
            "environment": environment("cpu"),
            "width": WIDTH,
            "images": data.train.n,
            "batch": BATCH,
            **{name: settings.model_dump(mode="json") for name, settings in recipes.items()},
            "forms": FORMS,
            "images_counted": IMAGES_COUNTED,
            "rows": rows,
        }
        atomic.write_text(RESULT, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--work", required=True, type=Path, help="where networks are kept")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="only this one")
    parser.add_argument("--figure", action="store_true", help="only draw, and print as a table, what is in the JSON")
    options = parser.parse_args()
    networks = Networks(options)
    if not options.figure:
        for form, density in NETWORKS:
            for seed in options.seed or SEEDS:
                networks.made(form, seed, density)
    draw(networks.rows)
    print("\n".join(table(networks.rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the top-1 of each seed, and multiplications in the seven layers, mean of the seeds."""
    lines = [f"| network | weights kept | {' | '.join(f'seed {seed}' for seed in SEEDS)} | multiplications |"]
    lines.append("|---|---|" + "---|" * len(SEEDS) + "---|")
    for form, density in sorted(NETWORKS, key=lambda network: (list(FORMS).index(network[0]), -(network[1] or 2))):
        own = {row["seed"]: row for row in rows if (row["mode"], row["density"]) == (form, density)}
        if own:
            kept = "all" if density is None else "all, trained on" if density == 1 else f"{density:.0%}"
            top1 = " | ".join(f"{100 * own[seed]['top1']:.2f} %" if seed in own else "-" for seed in SEEDS)
            lines.append(f"| {form} | {kept} | {top1} | {_mean(list(own.values()), 'workload'):.3f} |")
    return lines


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy against density and against workload, the mean of the seeds and each of them."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and ids don't change from run to run.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tersenet"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for mode, colour in zip(FORMS, (f"C{number}" for number in range(len(FORMS))), strict=True):
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


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _log(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
