"""The Winograd-aware paper's ResNet-18, narrowed: normal training, adaptation to F4 at 8 bits, interrupted and resumed.

    python -m benchmarks.winograd_resnet18_cifar10 --data cifar10:DIR --work FOLDER

The recipe winograd_resnet18_cifar10_adapt on the command line, as a user runs it, with what `CHANGES` changes so that
one CPU core can train it. It is run twice. `whole` is never stopped. `stopped` gets Ctrl-C in the middle of an epoch of
normal training, then, after the same command again, SIGTERM in the middle of an epoch of adaptation, and then the same
command a last time. Every tensor of both networks, after each step, and every figure of each epoch is compared.

Beside it, from the network that normal training gave: the same layers swapped and calibrated without training, with one
scale per tensor and per tap; and as much training again without Winograd, since adaptation is more training too.

Writes winograd_resnet18_cifar10.json and .svg beside this file. Both runs are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU, applied, figures

from tersenet.data.load import load_data
from tersenet.environment import environment
from tersenet.exporting import artifact
from tersenet.methods.base import TrainingMethod
from tersenet.methods.winograd_aware import WinogradSwap
from tersenet.recipe import load_recipe
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit

RESULT = Path(__file__).with_suffix(".json")
RECIPE = "winograd_resnet18_cifar10_adapt"
CHANGES = (
    "model_arguments.width=8",
    "data.train_limit=5000",
    "data.validation=1000",
    "steps.0.fit.epochs=5",
    "steps.0.fit.milestones=[3,4]",
    "steps.1.fit.epochs=2",
    "steps.1.fit.milestones=[1]",
)
STOPS = ((0, 1, signal.SIGINT), (1, 0, signal.SIGTERM))
"""Step, the epoch behind which the run is stopped half an epoch later, and how."""
STEPS = ("00-train", "01-winograd_aware")
SWAPPED: tuple[dict[str, Any], ...] = (
    {"tile": "direct"},
    {"tile": 4, "quantizers": "reference"},
    {"tile": 4, "quantizers": "tapwise"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--work", required=True, type=Path, help="where both runs are kept")
    parser.add_argument("--figure", action="store_true", help="only draw what is in the JSON")
    options = parser.parse_args()
    if not options.figure:
        options.work.mkdir(parents=True, exist_ok=True)
        measure(options.data, options.work)
    draw(json.loads(RESULT.read_text()))


def measure(data: str, work: Path) -> None:
    torch.set_num_threads(1)
    whole, stopped = work / "whole", work / "stopped"
    finish(data, whole)
    report = report_of(whole)
    # Interrupted in its turn, this begins the stopped run anew: half of it would not be what is described.
    stops = work / "stops.json"
    if not stops.is_file():
        stops.write_text(json.dumps(stop_often(data, stopped)))
    result: dict[str, Any] = {
        "claim": "the Winograd-aware ResNet-18, narrowed, trained, adapted to F4 at 8 bits, interrupted and resumed",
        "command": "python -m benchmarks.winograd_resnet18_cifar10 --data cifar10:DIR --work FOLDER",
        "environment": environment("cpu"),
        "recipe": RECIPE,
        "changes": CHANGES,
        "params": report["before"]["params"],
        "trained": accuracy_of(report["steps"][0]["after"]),
        "adapted": accuracy_of(report["steps"][1]["after"]),
        "stops": json.loads(stops.read_text()),
        "curves": curves_of(whole),
        "resumed": compared(whole, stopped),
    }
    result |= beside(data, whole / "steps" / STEPS[0] / "model")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def command_of(data: str, folder: Path) -> list[str]:
    changes = [text for change in CHANGES for text in ("--set", change)]
    command = ["compress", "--recipe", RECIPE, "--data", data, *changes, "--device", "cpu", "--out", str(folder)]
    return [sys.executable, "-m", "tersenet", *command]


def start(data: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """One thread: with another number of them sums round differently, and runs are not bit-equal."""
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command_of(data, folder), *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            # What a shell starts in the background ignores Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def finish(data: str, folder: Path) -> None:
    code = start(data, folder).wait()
    if code != 0:
        sys.exit(f"{folder} ended with {code}; see {folder.with_suffix('.log')}")


def stop_often(data: str, folder: Path) -> list[dict[str, Any]]:
    """Runs the command, stopped at each of `STOPS`, then to its end; what happened at each."""
    found: list[dict[str, Any]] = []
    for place, (step, epoch, how) in enumerate(STOPS):
        process = start(data, folder, *(["--fresh"] if place == 0 else []))
        seconds = wait_for(folder, step, epoch, process)
        time.sleep(seconds / 2)
        process.send_signal(how)
        code = process.wait()
        done = epochs_done(folder, step)
        found.append({"step": STEPS[step], "signal": how.name, "exit_code": code, "epochs_done": done})
        if code == 0 or done != epoch + 1:
            sys.exit(f"{how.name} came too late: {found[-1]}")
    finish(data, folder)
    return found


def wait_for(folder: Path, step: int, epoch: int, process: subprocess.Popen[bytes]) -> float:
    """Until the epoch is done; how long it took, in seconds."""
    while process.poll() is None:
        if epochs_done(folder, step) > epoch:
            return [event["seconds"] for event in events(folder) if event["event"] == "epoch"][-1]
        time.sleep(0.2)
    sys.exit(f"{folder} ended before it was stopped; see {folder.with_suffix('.log')}")


def epochs_done(folder: Path, step: int) -> int:
    now = None
    done = 0
    for event in events(folder):
        if event["event"] == "step_start":
            now = event["index"]
        done += event["event"] == "epoch" and now == step
    return done


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    # What is being written may end in half a line.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def curves_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of every step's epochs, without their times."""
    steps = report_of(folder)["steps"]
    return [[{k: v for k, v in row.items() if k != "seconds"} for row in step["curves"]] for step in steps]


def accuracy_of(measures: dict[str, Any]) -> dict[str, Any]:
    return {name: measures["accuracy"][name] for name in ("top1", "correct", "n")}


def compared(whole: Path, stopped: Path) -> dict[str, Any]:
    """Whether both runs gave the same numbers, and how many there are."""
    same: dict[str, Any] = {"tensors": 0, "different": []}
    for step in STEPS:
        one, other = (artifact.load(folder / "steps" / step / "model").state_dict() for folder in (whole, stopped))
        same["tensors"] += len(one)
        names = one.keys() | other.keys()
        same["different"] += [
            f"{step}: {name}"
            for name in sorted(names)
            if name not in one or name not in other or not torch.equal(one[name], other[name])
        ]
    same["curves_equal"] = curves_of(whole) == curves_of(stopped)
    same["epochs_run_by_the_stopped"] = [epochs_done(stopped, step) for step in range(len(STEPS))]
    return same


def beside(data: str, trained: Path) -> dict[str, Any]:
    """From the network that normal training gave: swapped only, and trained on without Winograd."""
    recipe = load_recipe(RECIPE, [f"data.source={json.dumps(data)}", *CHANGES])
    assert recipe.data is not None
    model, images = artifact.load(trained), load_data(recipe.data, seed=recipe.seed)
    rows: list[dict[str, Any]] = []
    for settings in SWAPPED:
        swapped, _ = applied(WinogradSwap.model_validate(settings), model, images)
        rows.append({"settings": settings, **figures(swapped, images)})
    adaptation = recipe.steps[1]
    assert isinstance(adaptation, TrainingMethod)
    fit(
        model, images, adaptation.fit, seed=recipe.seed * 1000 + 1, device=CPU, hooks=Hooks(), checkpoint=None,
        log=lambda row: None,
    )  # fmt: skip
    return {"swapped": rows, "trained_on": figures(model, images)}


def draw(result: dict[str, Any]) -> None:
    """Accuracy on the validation images after each epoch, where the second run was stopped, and the test accuracies."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and ids don't change from run to run.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tersenet"}
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    first = 0
    for rows, title in zip(result["curves"], ("normal training", "adaptation, F4, 8 bits"), strict=True):
        epochs = range(first + 1, first + len(rows) + 1)
        curves.plot(epochs, [100 * row["val_top1"] for row in rows], "o-", label=title)
        for stop in result["stops"]:
            if STEPS.index(stop["step"]) == (0 if first == 0 else 1):
                at = first + stop["epochs_done"] + 0.5
                curves.axvline(at, color="grey", ls=":", lw=1)
                curves.text(at, 31, stop["signal"], color="grey", fontsize=8, rotation=90, ha="right")
        first += len(rows)
    curves.set(xlabel="epoch", ylabel="top-1, %, validation images")
    curves.legend(loc="center right", bbox_to_anchor=(1, 0.35))
    named = {
        "trained": result["trained"],
        **{f"swapped: {_title(row['settings'])}": row for row in result["swapped"]},
        "adapted: F4, per tap, flex": result["adapted"],
        "trained on in floating point": result["trained_on"],
    }
    bars.barh(list(named), [100 * row["top1"] for row in named.values()])
    for place, row in enumerate(named.values()):
        bars.text(100 * row["top1"], place, f" {100 * row['top1']:.1f}", va="center", fontsize=8)
    bars.invert_yaxis()
    bars.set(xlabel="top-1, %, 10,000 test images", xlim=(0, 100))
    figure.savefig(RESULT.with_suffix(".svg"), metadata={"Date": None})


def _title(settings: dict[str, Any]) -> str:
    if settings["tile"] == "direct":
        return "direct, 8 bits"
    return f"F{settings['tile']}, {'per tensor' if settings['quantizers'] == 'reference' else 'per tap'}"


if __name__ == "__main__":
    main()
