"""Rates chosen layer by layer against the scopes of `magnitude`, on a trained ResNet-20, without any training after it.

    python -m benchmarks.sensitivity_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

The analysis takes 1,000 validation images. For each allowed drop: `magnitude` with the rates that follow, and in both
of its scopes with at most as many MACs; batch norm statistics from 16 training batches; top-1 on the 10,000 test
images. Writes sensitivity_resnet20_cifar10.json beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cifar_resnet import applied, described, figures, opened, parser_of

import tersenet as tn
from tersenet.methods.magnitude import Magnitude
from tersenet.recipe_target import Target

DROPS = (0.005, 0.01, 0.03)
CLAIM = (
    "ResNet-20 on CIFAR-10 right after one-shot pruning, rates by sensitivity against magnitude's scopes; no training"
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", help="folder of the analysis, to go on with it")
    options = parser.parse_args()
    model, data = opened("resnet20", options)

    def pruned(target: Target | None, **settings: Any) -> dict[str, Any]:
        network, left = applied(Magnitude(recalibrate_bn=16, **settings), model, data, target)
        return {"macs": left, **figures(network, data)}

    found = tn.sensitivity("resnet20", options.data, weights=options.weights, out=options.out, device="cpu")
    rows: list[dict[str, Any]] = []
    for drop in DROPS:
        rates = found.rates(max_drop=drop)
        chosen = pruned(None, rates=rates)
        target = Target.parse(f"macs={100 * chosen['macs']:.4f}%")
        same = {scope: pruned(target, scope=scope) for scope in ("local", "global")}
        rows.append({"max_drop": drop, "rates": rates, "chosen": chosen} | same)
        print(rows[-1], flush=True)
    result = described(CLAIM, __file__, options) | {
        "start": figures(model, data),
        "baseline": found.baseline.model_dump(),
        "layers": [
            {
                "name": layer.name,
                "channels": layer.channels,
                "macs_share": layer.macs_share,
                "drops": {str(point.rate): found.drop(point) for point in layer.points},
            }
            for layer in found.layers
        ],
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
