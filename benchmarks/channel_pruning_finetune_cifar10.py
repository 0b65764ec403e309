"""ResNet-56 on CIFAR-10 at half of its MACs by channel pruning: right after it, and after 3 epochs. Resumable.

    python -m benchmarks.channel_pruning_finetune_cifar10 --data cifar10:DIR --weights resnet56-4bfd9763.th

Carries out the recipe `channel_pruning_resnet56_cifar10`: pruning from training images without labels, then 3 epochs
with a cosine schedule and distillation from the network as it was. Writes channel_pruning_finetune_cifar10.json beside
this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.cifar_resnet import described, parser_of

import tersenet as tn
from tersenet.cli.progress import Progress
from tersenet.results import Measures, StepResult

RECIPE = "channel_pruning_resnet56_cifar10"
RESULT = Path(__file__).with_suffix(".json")
STEPS = {"pruned": "00-channel_pruning", "tuned": "01-train"}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/channel_pruning"))
    options = parser.parse_args()
    shown = Progress()

    def on_event(event: dict[str, Any]) -> None:
        shown(event)
        if event["event"] == "step_done":
            write(options)

    tn.compress("resnet56", RECIPE, data=options.data, weights=options.weights, out=options.runs, on_event=on_event)
    write(options)


def write(options: argparse.Namespace) -> None:
    """What the run's folder holds by now."""
    before = Measures.model_validate_json((options.runs / "before" / "measures.json").read_bytes())
    claim = "ResNet-56 on CIFAR-10 at half of its MACs, right after pruning and after 3 epochs of fine-tuning"
    result = described(claim, __file__, options) | {
        "recipe": RECIPE,
        "start": {"top1": before.top1, "macs": before.macs, "n": before.n_eval},
    }
    for name, folder in STEPS.items():
        done = options.runs / "steps" / folder / "done.json"
        if done.is_file():
            step = StepResult.model_validate_json(done.read_bytes())
            after = {"top1": step.after.top1, "macs": step.after.macs, "macs_left": step.after.macs / before.macs}
            result[name] = after | {"settings": step.settings, "curve": step.curves}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
