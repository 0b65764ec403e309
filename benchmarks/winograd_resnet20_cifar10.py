"""A trained ResNet-20 with its convolutions swapped for Winograd ones: calibrated only, and adapted by some training.

    python -m benchmarks.winograd_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

After calibration on 8 training batches of 128: direct convolutions, F2, F4 and F6 at 16, 10 and 8 bits, with the
paper's quantizers (one scale per tensor) and with one scale per tap. Adapted, at 8 bits: the same weights trained on
`--train-limit` training images, `--epochs` times over, with Adam at 2e-4 that falls to 0 as a cosine; the direct
convolution is trained equally long, and so is the float network. All on the 10,000 test images, which choose nothing.
The first layer and those with a stride are as the method leaves them by default.

Writes winograd_resnet20_cifar10.json beside this file after each row, and leaves out rows that are in it; at the end
it draws winograd_resnet20_cifar10.svg. `--only` without a word draws only.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU, applied, described, figures, opened, parser_of
from torch import nn

from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.winograd_aware import WinogradAware, WinogradSwap
from tersenet.models.open import example_of
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit
from tersenet.train.settings import Fit

RESULT = Path(__file__).with_suffix(".json")
SWAPPED: tuple[dict[str, Any], ...] = (
    {"tile": 4, "bits": None},
    *({"tile": "direct"} | ({"bits": bits} if bits != 8 else {}) for bits in (16, 10, 8)),
    *(
        {"tile": tile, "quantizers": quantizers} | ({"bits": bits} if bits != 8 else {})
        for tile in (2, 4, 6)
        for bits in (16, 10, 8)
        for quantizers in ("reference", "tapwise")
    ),
    {"tile": 4, "quantizers": "tapwise", "product_bits": 10},
)
# None is the float network, trained as the others are.
ADAPTED: tuple[dict[str, Any] | None, ...] = (
    {"tile": 4, "quantizers": "tapwise", "flex": "full"},
    {"tile": 4, "quantizers": "tapwise", "flex": "static"},
    {"tile": 2, "quantizers": "tapwise", "flex": "full"},
    {"tile": 6, "quantizers": "tapwise", "flex": "full"},
    {"tile": 4, "quantizers": "reference", "flex": "full"},
    {"tile": 4, "quantizers": "reference", "flex": "static"},
    {"tile": "direct"},
    None,
    {"tile": 4, "quantizers": "tapwise", "flex": "full", "scale": "learned"},
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--train-limit", type=int, default=12_800, help="training images of an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--first", type=int, help="only so many of the adapted rows")
    parser.add_argument("--only", nargs="*", default=["swapped", "adapted"], choices=["swapped", "adapted"])
    options = parser.parse_args()
    model, data = opened("resnet20", options)
    claim = "accuracy of ResNet-20 on CIFAR-10 by Winograd layers, after calibration and after adaptation"
    result: dict[str, Any] = described(claim, __file__, options) | {"start": None, "rows": [], "adapted": []}
    if RESULT.is_file():
        result |= {k: v for k, v in json.loads(RESULT.read_text()).items() if k in ("start", "rows", "adapted")}
    result["start"] = result["start"] or figures(model, data)

    def write(part: str, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        result[part].append(row)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")

    for settings in SWAPPED if "swapped" in options.only else ():
        if settings not in [row["settings"] for row in result["rows"]]:
            swapped, _ = applied(WinogradSwap.model_validate(settings), model, data)
            write("rows", {"settings": settings, **figures(swapped, data)})
    training = settings_of(options)
    for settings in ADAPTED[: options.first] if "adapted" in options.only else ():
        known = [(row["settings"], row["train_images"], row["epochs"]) for row in result["adapted"]]
        if (settings, options.train_limit, options.epochs) not in known:
            found = adapted(settings, training, model, data, options)
            row = {"settings": settings, "train_images": options.train_limit, "epochs": options.epochs}
            write("adapted", row | {"of_an_epoch": options.train_limit * options.epochs / 50_000} | found)
    draw(result)


def settings_of(options: argparse.Namespace) -> Fit:
    """Without weight decay: this is too short for it."""
    return Fit(
        epochs=options.epochs, optimizer="adam", lr=2e-4, schedule="cosine", weight_decay=0.0, channels_last=False
    )


def adapted(
    settings: dict[str, Any] | None, training: Fit, model: nn.Module, data: Data, options: argparse.Namespace
) -> dict[str, Any]:
    """Top-1 of a copy of `model` after it was swapped, calibrated and trained."""
    model = copy.deepcopy(model)
    hooks = Hooks()
    torch.manual_seed(0)
    limited = DataSettings(source=options.data, batch_size=128, train_limit=options.train_limit)
    part = dataclasses.replace(load_data(limited, seed=0, normalise=data.normalise), validation=None)
    if settings is not None:
        graph = ModelGraph(model, example_of(model, batch=2))
        context = Context(CPU, 0, data=part)
        method = WinogradAware(fit=training, **settings)
        method.apply(graph, context)
        hooks = method.hooks(graph, context)
    rows = fit(model, part, training, seed=0, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
    return figures(model, data) | {"train_loss": rows[-1]["train_loss"]}


def draw(result: dict[str, Any]) -> None:
    """What calibration alone leaves, by bits; and what training adds at 8 bits, by the images that each row saw."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and ids don't change from run to run.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tersenet"}
    from matplotlib import pyplot

    figure, (swapped, trained) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    lines: dict[tuple[Any, str], dict[int, float]] = {}
    for row in result["rows"]:
        s = row["settings"]
        if s.get("bits", 8) is not None and "product_bits" not in s:
            line = lines.setdefault((s["tile"], s.get("quantizers", "")), {})
            line[s.get("bits", 8)] = 100 * row["top1"]
    for (tile, quantizers), line in lines.items():
        colour = {"direct": "black", 2: "C0", 4: "C1", 6: "C2"}[tile]
        style = ":" if quantizers == "reference" else "-"
        points = sorted(line.items())
        swapped.plot(
            *zip(*points, strict=True), "o" + style, color=colour, label=title({"tile": tile} | _named(quantizers))
        )
    swapped.set(xlabel="bits", ylabel="top-1, %, 10,000 test images", xticks=(8, 10, 16), title="calibrated only")
    swapped.legend(fontsize=8)
    rows = sorted(result["adapted"], key=lambda row: row["top1"])
    names = [f"{title(row['settings'])}: {row['train_images'] * row['epochs']:,} images" for row in rows]
    trained.barh(names, [100 * row["top1"] for row in rows])
    for place, row in enumerate(rows):
        trained.text(94, place, f"{100 * row['top1']:.2f}", va="center", fontsize=8)
    trained.axvline(100 * result["start"]["top1"], color="grey", ls=":", label="float network, as it came")
    trained.set(xlabel="top-1, %", xlim=(0, 108), title="adapted, 8 bits")
    trained.legend(fontsize=8, loc="lower right", bbox_to_anchor=(0.85, 0))
    figure.savefig(RESULT.with_suffix(".svg"), metadata={"Date": None})


def _named(quantizers: str) -> dict[str, str]:
    return {"quantizers": quantizers} if quantizers else {}


def title(settings: dict[str, Any] | None) -> str:
    """Such as `F4, per tap, flex`."""
    if settings is None:
        return "float"
    words = ["direct" if settings["tile"] == "direct" else f"F{settings['tile']}"]
    if "quantizers" in settings:
        words.append("per tensor" if settings["quantizers"] == "reference" else "per tap")
    if "flex" in settings:
        words.append("flex" if settings["flex"] == "full" else str(settings["flex"]))
    if settings.get("scale") == "learned":
        words.append("learned scales")
    return ", ".join(words)


if __name__ == "__main__":
    main()
