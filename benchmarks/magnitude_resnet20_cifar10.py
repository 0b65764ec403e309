"""What each importance score leaves of a trained ResNet-20, without any training after it.

    python -m benchmarks.magnitude_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

For both scopes and every score: prune to 70 % of the MACs, estimate batch norm statistics from 16 training batches,
evaluate on the 10,000 test images. Writes magnitude_resnet20_cifar10.json beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cifar_resnet import applied, described, figures, opened, parser_of

from tersenet.methods.magnitude import Magnitude
from tersenet.recipe_target import Target

TARGET = "macs=70%"
SCORES = ("l1", "l2", "fpgm", "bn_scale", "taylor", "activation", "apoz", "random")


def main() -> None:
    options = parser_of(__doc__).parse_args()
    model, data = opened("resnet20", options)
    rows: list[dict[str, Any]] = []
    for scope in ("local", "global"):
        for score in SCORES:
            method = Magnitude.model_validate({"scope": scope, "score": score, "recalibrate_bn": 16})
            pruned, left = applied(method, model, data, Target.parse(TARGET))
            row = {"target": TARGET, "scope": scope, "score": score, **figures(pruned, data), "macs_left": left}
            print(row, flush=True)
            rows.append(row)
    claim = "accuracy of ResNet-20 on CIFAR-10 right after one-shot pruning, no training"
    result = described(claim, __file__, options) | {"start": figures(model, data), "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
