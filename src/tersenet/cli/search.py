"""tersenet search"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersenet.cli import console, options
from tersenet.cli.console import examples, note_random_weights, show, width
from tersenet.cli.trials import ExcludeOption, IncludeOption, SplitOption, TrialProgress, folder_for, interruptible

if TYPE_CHECKING:
    from tersenet.search.amc_settings import AmcResult

EXAMPLES = examples(
    "tersenet search runs/demo/model --data digits --target macs=50% --episodes 40 --out runs/search-demo",
    "tersenet compress runs/demo/model --recipe runs/search-demo/recipe.yaml --data digits",
    "",
    "tersenet search resnet56 --weights resnet56-4bfd9763.th --data cifar10:DIR \\",
    "    --target macs=50% --residual independent",
)
_LINES = 20  # in a log file


class Progress(TrialProgress):
    """On a terminal one line that is rewritten, in a log file some twenty lines."""

    def started(self, event: dict[str, Any]) -> str:
        known = f", {self.done} known" if self.done else ""
        return f"{event['layers']} layers, {self.of} episodes{known}"

    def trial(self, event: dict[str, Any]) -> str:
        best = "" if event["best"] is None else f"  best {event['best']:.4g}"
        return f"{event['kind']}  {event['problem'] or format(event['value'], '.4g')}{best}"

    def worth_a_line(self, event: dict[str, Any]) -> bool:
        return self.done in (1, 2, self.of) or self.done % max(1, self.of // _LINES) == 0


def search(
    model: options.ModelArgument,
    data: options.DataOption,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="BUDGET",
            help="macs=50%, params=0.3M, latency=60%, latency=4ms: what no episode exceeds.",
        ),
    ] = None,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    prune: Annotated[
        str, typer.Option("--prune", metavar="METHOD", help="What prunes: channel_pruning or magnitude.")
    ] = "channel_pruning",
    reward: Annotated[
        str,
        typer.Option("--reward", metavar="R", help="accuracy; or macs, params: error times the logarithm of the cost."),
    ] = "accuracy",
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Networks that are pruned and evaluated.")] = 800,
    lowest: Annotated[
        float, typer.Option("--lowest", metavar="SHARE", help="Of each layer's channels, that stays at least.")
    ] = 0.2,
    multiple: Annotated[
        int, typer.Option("--multiple", metavar="N", min=1, help="Leave a multiple of N channels in every layer.")
    ] = 1,
    images: Annotated[int, typer.Option("--images", min=1, help="Training images that layers are fitted to.")] = 500,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images that every episode is evaluated on.")] = 1000,
    split: SplitOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    residual: Annotated[
        str, typer.Option("--residual", metavar="MODE", help="coupled or independent, as for the method that prunes.")
    ] = "coupled",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; by default runs/search-MODEL.")
    ] = None,
    as_json: options.JsonOption = False,
    device: options.DeviceOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of every draw.")] = 0,
    fresh: options.FreshOption = False,
) -> None:
    """How many channels each layer keeps within a budget, by an agent that learns from trials (AMC).

    The folder gets recipe.yaml, which prunes with the rates that were found. The same command run again goes on where
    it stopped.
    """
    from tersenet.data.registry import parse
    from tersenet.search.amc_settings import AmcSettings

    # What is wrong on the command line is said before torch is imported, which takes seconds.
    settings: dict[str, Any] = {"target": target, "reward": reward, "prune": prune, "episodes": episodes}
    settings |= {"lowest": lowest, "multiple": multiple, "images": images, "samples": samples, "split": split}
    settings |= {"include": tuple(include or ["*"]), "exclude": tuple(exclude or []), "residual": residual}
    settings["seed"] = seed
    AmcSettings(**settings)
    parse(data)
    from tersenet import api_search
    from tersenet.search.amc import RECIPE

    folder = folder_for("search", model, out)
    progress = Progress()
    more: dict[str, Any] = {"weights": weights, "base": base, "device": device, "fresh": fresh, "out": folder}
    command = shlex.join(console.command)
    with interruptible(progress, "episodes"):
        found = api_search.search_rates(model, data, **settings, **more, on_event=progress, command=command)
    note_random_weights(model, weights)
    show(found.model_dump(mode="json"), lambda: f"{_text(found)}\n{folder / RECIPE}", as_json)


def _text(found: AmcResult) -> str:
    """Layers, and what was found beside what the search started from."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from tersenet.report import format as f
    from tersenet.search.amc_rewards import shown, value_of

    layers = Table("layer", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("channels", "kept", "rate"):
        layers.add_column(head, justify="right")
    for layer in found.layers:
        layers.add_row(f.clean(layer.name), str(layer.channels), str(layer.kept), f"{layer.rate:.3f}")
    starts = [episode for kind in ("even", "measured") if (episode := found.first(kind)) is not None]
    rows = [("whole", found.macs, found.params, value_of(found.baseline))]
    rows += [(row.kind, row.macs, row.params, shown(row)) for row in starts]
    best = found.chosen
    rows.append((f"best, episode {found.best}", best.macs, best.params, shown(best)))
    score = "top-1" if found.baseline.top1 is not None else "metric" if found.baseline.metric is not None else "-loss"
    networks = Table("network", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("MACs", "params", f"{score}, {found.accuracy.n} {f.clean(found.split)} images"):
        networks.add_column(head, justify="right")
    for name, macs, params, value in rows:
        figure = "not finite" if value is None else f.percent(value) if score == "top-1" else f.number(value)
        networks.add_row(name, f.count(macs), f.count(params), figure)
    out = Console(width=width(), color_system=None, force_terminal=False, legacy_windows=False)
    with out.capture() as captured:
        out.print(layers)
        out.print()
        out.print(networks)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
