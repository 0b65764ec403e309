"""SqueezeNet and MobileNetV2 on real ImageNet images, right after pruning: channel pruning beside magnitude.

    python -m benchmarks.channel_pruning_imagenet --shared FOLDER

FOLDER holds `cnn_data.py` with the networks and loaders, `weights/` and `imagenet_sample/`: 500 images of 500 classes.
Every second image calibrates, the others measure; nothing is trained. For 90, 80, 70, 60 and 50 % of the MACs. Writes
channel_pruning_imagenet.json beside this file after each row, leaves out rows that are in it, and draws
docs/methods/channel_pruning_imagenet.svg.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from benchmarks.cifar_resnet import CPU
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tersenet.data.bundle import Data, LoaderAdapter
from tersenet.environment import environment
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context, Method
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.magnitude import Magnitude
from tersenet.progress import Progress
from tersenet.recipe_target import Target
from tersenet.report.svg import SERIES, SETTINGS, SOFT, margins, new_figure, to_svg

RESULT = Path(__file__).with_suffix(".json")
FIGURE = Path(__file__).parents[1] / "docs" / "methods" / "channel_pruning_imagenet.svg"
TARGETS = (90, 80, 70, 60, 50)
NETWORKS = {"SqueezeNet 1.0": "squeezenet", "MobileNetV2": "mobilenet"}
METHODS: dict[str, Method] = {
    "channel pruning": ChannelPruning(),
    "magnitude l2, global": Magnitude(score="l2", scope="global"),
    "magnitude l1, even rates": Magnitude(score="l1"),
}
STYLE = (
    "<style>svg { font-family: sans-serif; background: #fff; --ink: #14181d; --soft: #5b6570; --line: #e3e6e9;"
    " --before: #ccd3da; --after: #2468ad; --s2: #c0701d; --s3: #6c55b8; --s4: #23856d }</style>"
)


class Damages(Progress):
    """What each layer's loss does to the outputs is the same for every target: it is measured once."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Any] = {}

    def get(self, name: str) -> Any | None:
        return self.known.get(name)

    def put(self, name: str, value: Any) -> None:
        if name.startswith("damage "):
            self.known[name] = value


def opened(shared: Path, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, all images as it takes them, and their labels."""
    spec = importlib.util.spec_from_file_location("cnn_data", shared / "cnn_data.py")
    assert spec is not None
    assert spec.loader is not None
    source: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    images, labels, _ = source.images(str(shared / "imagenet_sample" / "imagenet_sample_500.npz"))
    if name == "squeezenet":
        model, x = source.load_squeezenet(str(shared / "weights" / "compressed_SqueezeNet.net")), None
        x = source.squeezenet_prep(images)
    else:
        model, size = source.load_mobilenet(str(shared / "weights" / "mobilenet_v2_1.0_224_ptq_int8.npz"))
        x = source.to_tensor(source.crop(images, 224, size), source.HALF_NORM)
    return model.eval(), x, torch.as_tensor(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    result = {
        "claim": "accuracy on 250 ImageNet images right after pruning, calibrated on 250 others, nothing trained",
        "runs_each": 1,
        "environment": environment("cpu"),
        "command": "python -m benchmarks.channel_pruning_imagenet --shared FOLDER",
        "rows": rows,
    }
    for network in options.only:
        model, x, labels = opened(options.shared, NETWORKS[network])
        train = DataLoader(TensorDataset(x[::2], labels[::2]), batch_size=25)
        data = Data(
            "sample", LoaderAdapter(train, name="calibration", train=True), None, None, 1000, tuple(x.shape[1:]), None
        )
        damages = Damages()
        cases = [(name, f"macs={target}%") for name in METHODS for target in TARGETS]
        for name, target in [("whole", "macs=100%"), *cases]:
            if any((row["network"], row["method"], row["target"]) == (network, name, target) for row in rows):
                continue
            pruned = copy.deepcopy(model)
            graph = ModelGraph(pruned, (torch.zeros(2, *x.shape[1:]),))
            whole = graph.macs()
            if name != "whole":
                context = Context(CPU, 0, Target.parse(target), whole, graph.params(), data, progress=damages)
                METHODS[name].apply(graph, context)
            left = ModelGraph(pruned, graph.example).macs() / whole
            row = {"network": network, "method": name, "target": target, "macs_left": left}
            rows.append(row | scored(pruned, x[1::2], labels[1::2]))
            print(json.dumps(rows[-1]), flush=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    FIGURE.write_text(drawn(rows))


@torch.no_grad()
def scored(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    logits = torch.cat([model(part) for part in x.split(25)])
    top5 = logits.topk(5).indices
    correct = top5[:, 0] == labels
    return {
        "top1": float(correct.double().mean()),
        "top5": float((top5 == labels[:, None]).any(1).double().mean()),
        "correct": int(correct.sum()),
        "n": len(labels),
    }


def drawn(rows: list[dict[str, Any]]) -> str:
    """Top-1 against the share of the MACs that is left, one panel for each network."""
    with mpl.rc_context(SETTINGS):
        figure = new_figure(880, 330)
        for place, network in enumerate(NETWORKS):
            axes = figure.add_axes(margins(figure, 56 + 430 * place, 44, 40 + 430 * (1 - place), 30))
            own = [row for row in rows if row["network"] == network]
            whole = [(row["macs_left"], row["top1"]) for row in own if row["method"] == "whole"]
            for name, color in zip(METHODS, SERIES, strict=False):
                points = whole + [(row["macs_left"], row["top1"]) for row in own if row["method"] == name]
                axes.plot([100 * x for x, _ in points], [100 * y for _, y in points], "o-", color=color, label=name)
            axes.set_title(f"{network}: top-1, %", loc="left", fontsize=11, color=SOFT)
            axes.set_xlabel("MACs left, %")
            axes.set_xlim(102, 48)
            axes.set_ylim(0, 100)
            axes.grid(True)
            if place == 0:
                axes.legend(frameon=False, fontsize=10)
        svg = to_svg(figure, "imagenet")
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{STYLE}", 1) + "\n"


if __name__ == "__main__":
    main()
