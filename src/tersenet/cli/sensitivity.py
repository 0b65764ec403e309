"""tersenet sensitivity"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tersenet.cli import console, options
from tersenet.cli.console import examples, note_random_weights, show, width
from tersenet.cli.trials import ExcludeOption, IncludeOption, SplitOption, TrialProgress, folder_for, interruptible
from tersenet.errors import TersenetError

EXAMPLES = examples(
    "tersenet sensitivity runs/demo/model --data digits",
    "",
    "tersenet sensitivity resnet56 --weights resnet56-4bfd9763.th \\",
    "    --data cifar10:DIR --out runs/sensitivity-r56",
    "",
    "tersenet sensitivity resnet56 --weights resnet56-4bfd9763.th \\",
    "    --data cifar10:DIR --rates 0.25,0.5,0.75 --include 'layer3.*' --samples 2000",
)


class Progress(TrialProgress):
    """On a terminal one line that is rewritten, in a log file one line per layer."""

    def started(self, event: dict[str, Any]) -> str:
        known = f", {self.done} points known" if self.done else ""
        return f"{event['layers']} layers x {event['rates']} rates on {event['images']} images{known}"

    def trial(self, event: dict[str, Any]) -> str:
        name = next((name for name in ("top1", "metric", "loss") if event.get(name) is not None), None)
        if name is None:
            value = event["problem"] or "not finite"
        else:
            value = f"top-1 {event[name]:.2%}" if name == "top1" else f"{name} {event[name]:.4g}"
        return f"{event['layer']}  rate {event['rate']:g}  {value}"

    def worth_a_line(self, event: dict[str, Any]) -> bool:
        return event["last"]


def sensitivity(
    model: options.ModelArgument,
    data: options.DataOption,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    rates: Annotated[
        str | None, typer.Option("--rates", metavar="R,R,...", help="Shares of the channels; by default 0.1 to 0.9.")
    ] = None,
    importance: Annotated[
        str, typer.Option("--importance", metavar="SCORE", help="What tells the weakest channels, as for magnitude.")
    ] = "l1",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images that every point is evaluated on.")] = 1000,
    split: SplitOption = None,
    residual: Annotated[
        str, typer.Option("--residual", metavar="MODE", help="coupled or independent, as for magnitude.")
    ] = "coupled",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; by default runs/sensitivity-MODEL.")
    ] = None,
    as_json: options.JsonOption = False,
    device: options.DeviceOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the choice of images.")] = 0,
    fresh: options.FreshOption = False,
) -> None:
    """Accuracy against pruning rate, one layer at a time: where a network can be pruned, before anything is.

    The same command run again goes on where it stopped.
    """
    from tersenet.data.registry import parse
    from tersenet.search.settings import RATES, Settings

    # What is wrong on the command line is said before torch is imported, which takes seconds.
    settings: dict[str, Any] = {"rates": parse_rates(rates) if rates else RATES, "importance": importance}
    settings |= {
        "samples": samples,
        "split": split,
        "include": tuple(include or ["*"]),
        "exclude": tuple(exclude or []),
    }
    settings |= {"residual": residual, "seed": seed}
    Settings(**settings)
    parse(data)
    from tersenet import api_search
    from tersenet.search.folder import PAGE
    from tersenet.search.tables import render_text

    folder = folder_for("sensitivity", model, out)
    progress = Progress()
    more: dict[str, Any] = {"weights": weights, "base": base, "device": device, "fresh": fresh, "out": folder}
    command = shlex.join(console.command)
    with interruptible(progress, "points"):
        found = api_search.sensitivity(model, data, **settings, **more, on_event=progress, command=command)
    note_random_weights(model, weights)
    document = {**found.model_dump(mode="json"), "rates": found.rates()}
    show(document, lambda: f"{render_text(found, width())}\n{folder / PAGE}", as_json)


def parse_rates(text: str) -> tuple[float, ...]:
    """`0.1,0.5` as numbers. Raises: TersenetError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise TersenetError(f"--rates {text} must be numbers with commas between them, such as 0.1,0.3,0.5") from None
