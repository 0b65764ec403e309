"""tersenet compress"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersenet.cli import console, options
from tersenet.cli.console import examples, fail, show, width

if TYPE_CHECKING:
    from tersenet.recipe import Recipe

EXAMPLES = examples(
    "tersenet compress resnet8 --recipe sfp_digits --data digits",
    "",
    "tersenet compress resnet56 --recipe sfp_resnet56_cifar10_pretrained \\",
    "    --weights resnet56-4bfd9763.th --data cifar10:DIR --out runs/r56",
    "",
    "tersenet compress resnet56 --recipe sfp_resnet56_cifar10 \\",
    "    --data cifar10:DIR --set steps.0.rate=0.3 --dry-run",
    "",
    "tersenet compress my_package.nets:make --recipe mine.yaml \\",
    "    --data my_package.data:loaders --target macs=50%",
    "",
    "tersenet compress my_package.nets:make --recipe magnitude --input 3x64x64",
    "",
    "torchrun --nproc-per-node 8 -m tersenet compress resnet50 \\",
    "    --recipe sfp_resnet50_imagenet --data imagefolder:DIR",
)


def compress(
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="NAME|FILE", help="See `tersenet recipe list`.", show_default=False),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A name (`tersenet models`, timm:NAME, torchvision:NAME), package.module:function or a saved folder; "
            "else the recipe's.",
        ),
    ] = None,
    data: options.OptionalData = None,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    inputs: options.InputOption = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="BUDGET", help="macs=50%, macs=40M, params=0.3M: rates are solved from it."),
    ] = None,
    overrides: options.SetOption = None,
    out: options.OutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and train nothing.")] = False,
    as_json: options.JsonOption = False,
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    fresh: options.FreshOption = False,
) -> None:
    """Compress a network: run a recipe, measure before and after, and write a report.

    The run is a folder. The same command run again goes on where it stopped.
    """
    # The recipe's errors come at once; torch, which takes seconds, is imported after.
    from tersenet.recipe import load_recipe

    sizes = options.input_sizes(inputs)
    checked = load_recipe(recipe, [*data_source(data), *(overrides or [])])
    settings = {"weights": weights, "target": target, "device": device, "seed": seed, "base": base}
    folder = None if dry_run else out or default_folder(checked, model)
    more = {"dry_run": dry_run, "fresh": fresh, "input_shape": sizes or None}
    run(model, checked, folder, as_json=as_json, **more, **settings)


def run(model: str | None, recipe: Recipe, out: Path | None, *, as_json: bool, **settings: Any) -> None:
    """What `compress` and `train` share: run the recipe with progress on stderr, and show the report."""
    from tersenet import api
    from tersenet.cli.progress import Progress
    from tersenet.report.tables import render_text

    progress = Progress()
    try:
        given = shlex.join(console.command)
        result = api.compress(model, recipe, out=out, on_event=progress, command=given, **settings)
    except KeyboardInterrupt:
        progress.close()
        fail(f"interrupted; the same command goes on from {progress.done}", 130)
    finally:
        progress.close()
    document = result.report.model_dump(mode="json")
    where = f"\n\n{out / 'report.html'}" if out else ""
    show(document, lambda: render_text(result.report, width()) + where, as_json)


def data_source(data: str | None) -> list[str]:
    """--data as an override: it comes before those of --set, which may add to the data's settings."""
    return [] if data is None else [f"data.source={json.dumps(data, ensure_ascii=False)}"]


def default_folder(recipe: Recipe, model: str | None) -> Path:
    """The same for the same command, so that it finds its run again."""
    name = f"{recipe.name or 'recipe'}-{model or recipe.model}"
    return Path("runs") / re.sub(r"[^\w.-]+", "_", name)
