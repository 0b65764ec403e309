"""Soft filter pruning of ResNet-56 at 40 %, beside an unpruned control trained equally long. Resumable.

    python benchmarks/sfp_resnet56_cifar10.py --data cifar10:DIR --weights resnet56-4bfd9763.th --runs runs/bench

The published recipe (200 epochs from pretrained weights) is cut to 5 epochs: its learning rates are kept, each for a
part of the run. `published` is the paper's method; `momentum` changes one setting (`revive: momentum`); `control` is
not pruned. Writes sfp_resnet56_cifar10.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import tersenet as tn
from tersenet.cli.progress import Progress
from tersenet.results import Measures, Report

# The published rates: 0.001 for the first epoch, then 0.01, 0.002, 0.0004 (and 0.00008, left out in a short run).
RATES = [0.001, 0.01, 0.01, 0.002, 0.0004]
FIT: dict[str, Any] = {"epochs": len(RATES), "schedule": "list", "milestones": [], "gammas": 0.1, "lrs": RATES}
PRUNED = "sfp_resnet56_cifar10_pretrained"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "published": (PRUNED, {}),
    "momentum": (PRUNED, {"steps.0.revive": "momentum"}),
    "control": ("baseline_resnet56_cifar10", {}),
}
RESULT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    fit = {f"steps.0.fit.{name}": value for name, value in FIT.items()}
    reports = {
        name: tn.compress(
            "resnet56",
            recipe,
            data=options.data,
            weights=options.weights,
            out=options.runs / name,
            overrides=fit | more,
            on_event=Progress(),
        ).report
        for name, (recipe, more) in RUNS.items()
    }
    RESULT.write_text(json.dumps(result(reports), indent=1) + "\n")
    print(RESULT, file=sys.stderr)


def result(reports: dict[str, Report]) -> dict[str, Any]:
    before = reports["published"].before
    return {
        "claim": "SFP of ResNet-56 on CIFAR-10 at 40 % of the filters, from pretrained weights",
        "paper": {
            "epochs": 200,
            "top1": 0.9335,
            "baseline_top1": 0.9359,
            "macs_removed": 0.526,
            "source": "SFP, Table 1",
        },
        "reached": "no: 5 of 200 epochs",
        "epochs": len(RATES),
        "learning_rates": RATES,
        "runs_each": 1,
        "n_eval": before.n_eval,
        "start": figures(before),
        **{name: pruned(report) for name, report in reports.items() if name != "control"},
        "control": figures(reports["control"].after) | {"curve": reports["control"].steps[0].curves},
        "environment": reports["published"].environment,
        "command": "python benchmarks/sfp_resnet56_cifar10.py --data cifar10:DIR --weights resnet56-4bfd9763.th",
    }


def pruned(report: Report) -> dict[str, Any]:
    step = report.steps[0]
    return figures(report.after) | {
        "macs_removed": 1 - report.after.macs / report.before.macs,
        "top1_with_zeros": step.masked.top1 if step.masked else None,
        "compact_against_masked": step.equality.model_dump() if step.equality else None,
        "curve": step.curves,
    }


def figures(measures: Measures) -> dict[str, Any]:
    found: dict[str, Any] = {"top1": measures.top1, "macs": measures.macs, "params": measures.params}
    if measures.accuracy is not None:
        found["correct"] = measures.accuracy.correct
        found["interval"] = [measures.accuracy.top1_low, measures.accuracy.top1_high]
    return found


if __name__ == "__main__":
    main()
