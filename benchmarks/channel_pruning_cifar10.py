"""What channel pruning leaves of a trained CIFAR ResNet without any training after it, beside its baselines.

    python -m benchmarks.channel_pruning_cifar10 --model resnet56 --weights resnet56-4bfd9763.th --data cifar10:DIR

For 70 % and 50 % of the MACs: the whole method, the same with parts of it taken away, and `magnitude`; top-1 on the
10,000 test images, before any fine-tuning. Calibration takes 500 training images. Magnitude gets batch norm statistics
estimated anew on as many (4 batches); channel pruning needs none. Writes channel_pruning_MODEL_cifar10.json beside this
file after each row, and leaves out rows that are in it.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.cifar_resnet import applied, described, figures, opened, parser_of
from torch import nn

from tersenet.methods.base import Method
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.magnitude import Magnitude
from tersenet.recipe_target import Target

TARGETS = ("macs=50%", "macs=70%")
IMAGES = 500
ROWS: dict[str, Method] = {
    "LASSO, reconstruction": ChannelPruning(images=IMAGES),
    "LASSO, reconstruction, samplers": ChannelPruning(images=IMAGES, residual="independent"),
    "even rates: LASSO, reconstruction": ChannelPruning(images=IMAGES, allocate="uniform"),
    "even rates: max response, reconstruction": ChannelPruning(
        images=IMAGES, allocate="uniform", select="max_response"
    ),
    "even rates: first k, reconstruction": ChannelPruning(images=IMAGES, allocate="uniform", select="first"),
    "even rates: random, reconstruction": ChannelPruning(images=IMAGES, allocate="uniform", select="random"),
    "even rates: LASSO, no reconstruction": ChannelPruning(images=IMAGES, allocate="uniform", reconstruct=False),
    "even rates: LASSO, reconstruction, samplers": ChannelPruning(
        images=IMAGES, allocate="uniform", residual="independent"
    ),
    "magnitude l1, even rates": Magnitude(score="l1", recalibrate_bn=4),
    "magnitude l2, global": Magnitude(score="l2", scope="global", recalibrate_bn=4),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--target", nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    model, data = opened(options.model, options)
    path = Path(__file__).with_name(f"channel_pruning_{options.model}_cifar10.json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    claim = f"accuracy of {options.model} on CIFAR-10 right after pruning, no training"
    result = described(claim, __file__, options, f" --model {options.model}")
    result |= {"start": figures(model, data), "rows": rows}
    for target in options.target:
        for name in options.only:
            if any((row["target"], row["method"]) == (target, name) for row in rows):
                continue
            pruned, left = applied(ROWS[name], model, data, Target.parse(target))
            layers = {n: m for n, m in pruned.named_modules() if isinstance(m, nn.Conv2d)}
            widths = {name: [layer.in_channels, layer.out_channels] for name, layer in layers.items()}
            row = {"target": target, "method": name, **figures(pruned, data), "macs_left": left}
            print(json.dumps(row), flush=True)
            rows.append(row | {"widths": widths})
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
