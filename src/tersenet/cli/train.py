"""tersenet train"""

from __future__ import annotations

from typing import Annotated

import typer

from tersenet.cli import options
from tersenet.cli.compress import data_source, default_folder, run
from tersenet.cli.console import examples
from tersenet.errors import TersenetError

EXAMPLES = examples(
    "tersenet train resnet8 --data digits --epochs 15",
    "",
    "tersenet train resnet20 --data cifar10:DIR --epochs 60 --lr 0.1 \\",
    "    --set steps.0.fit.label_smoothing=0.1",
    "",
    "tersenet train resnet56 --data cifar10:DIR \\",
    "    --recipe baseline_resnet56_cifar10 --out runs/baseline",
)


def train(
    model: options.ModelArgument,
    data: options.DataOption,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training split.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate; by default 0.1.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="NAME", help="constant or cosine; by default cosine.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME|FILE", help="Take the settings of a recipe whose one step is `train`."),
    ] = None,
    weights: options.WeightsOption = None,
    overrides: options.SetOption = None,
    out: options.OutOption = None,
    as_json: options.JsonOption = False,
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    fresh: options.FreshOption = False,
) -> None:
    """Train a network without compressing it. For more settings than these, use --recipe or --set."""
    from tersenet.recipe import load_recipe

    if recipe is None and epochs is None:
        raise TersenetError("say how long to train, --epochs N, or give a --recipe")
    options_given = {"epochs": epochs, "lr": lr, "schedule": schedule}
    fit = [f"steps.0.fit.{name}={value}" for name, value in options_given.items() if value is not None]
    given = recipe or {"name": "train", "steps": [{"method": "train", "fit": {"lr": 0.1, "schedule": "cosine"}}]}
    checked = load_recipe(given, [*data_source(data), *fit, *(overrides or [])])
    if [step.method for step in checked.steps] != ["train"]:
        methods = ", ".join(step.method for step in checked.steps)
        raise TersenetError(f"recipe {recipe!r} does more than train ({methods}): run it with `tersenet compress`")
    settings = {"weights": weights, "device": device, "seed": seed}
    run(model, checked, out or default_folder(checked, model), as_json=as_json, fresh=fresh, **settings)
