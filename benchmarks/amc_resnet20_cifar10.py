"""Rates that AMC finds beside even and measured ones: ResNet-20 at half of its MACs, right after channel pruning.

    python -m benchmarks.amc_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

The search takes its images from the training split: 500 to fit to, others to evaluate on. Each row is the whole method
`channel_pruning` with those rates and 1,000 images, without any training, and top-1 on the 10,000 test images. Goes on
where it stopped with --out. Writes amc_resnet20_cifar10.json beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cifar_resnet import applied, described, figures, opened, parser_of

import tersenet as tn
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.recipe_target import Target

TARGET = "macs=50%"
CLAIM = "ResNet-20 on CIFAR-10 at half of its MACs right after channel pruning, by AMC's rates; no training"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", help="folder of the search, to go on with it")
    options = parser.parse_args()
    model, data = opened("resnet20", options)
    asked: dict[str, Any] = {"episodes": options.episodes, "samples": options.samples, "residual": "independent"}
    found = tn.search_rates(
        "resnet20", options.data, TARGET, weights=options.weights, out=options.out, device="cpu", **asked
    )
    target = Target.parse(TARGET)
    variants: dict[str, tuple[dict[str, Any], Target | None]] = {
        "even": ({"allocate": "uniform"}, target),
        "measured": ({}, target),
        "AMC": ({"rate": 0.0, "rates": found.rates}, None),
    }
    rows: list[dict[str, Any]] = []
    for name, (settings, budget) in variants.items():
        step = ChannelPruning.model_validate({"residual": "independent"} | settings)
        network, left = applied(step, model, data, budget)
        rows.append({"rates": name, "macs": left, **figures(network, data)})
        print(rows[-1], flush=True)
    starts = {kind: found.first(kind) for kind in ("even", "measured")}
    more = f" --episodes {options.episodes} --samples {options.samples}"
    result = described(CLAIM, __file__, options, more) | {
        "start": figures(model, data),
        "search": {
            "images": found.accuracy.n,
            "whole": found.baseline.top1,
            **{kind: start.accuracy.top1 for kind, start in starts.items() if start and start.accuracy},
            "best": found.accuracy.top1,
            "episode": found.best,
            "mean_of_each_tenth": _tenths([e.accuracy.top1 or 0.0 if e.accuracy else 0.0 for e in found.episodes]),
        },
        "layers": [layer.model_dump() for layer in found.layers],
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def _tenths(values: list[float]) -> list[float]:
    size = max(1, len(values) // 10)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [round(sum(part) / len(part), 4) for part in parts]


if __name__ == "__main__":
    main()
