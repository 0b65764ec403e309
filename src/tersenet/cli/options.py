"""Arguments and options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tersenet.errors import TersenetError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name (`tersenet models`, timm:NAME, torchvision:NAME), package.module:function, or a saved folder.",
        show_default=False,
    ),
]
DataOption = Annotated[
    str,
    typer.Option("--data", metavar="NAME[:DIR]", help="Data set, see `tersenet data list`.", show_default=False),
]
OptionalData = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME[:DIR]", help="Data set, see `tersenet data list`; else the recipe's."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="FILE", help="Weights to start from: .safetensors, .pt, .pth, .th, .pt.tar."),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="FUNCTION", help="Of a folder made from your own network: package.module:function."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEYS=VALUE", help="Override a field of the recipe: steps.0.rate=0.4; repeatable."),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the run; by default runs/RECIPE-MODEL."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="D", help="cpu, cuda, cuda:1; by default a GPU if there is one."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Overrides the recipe's seed.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start again; without it a run goes on where it stopped.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; progress goes to stderr.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="CxHxW", help="Input size, by default the model's own; again for each more input."),
]
_SIZES = re.compile(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,4}")


def input_sizes(given: Sequence[str] | None) -> list[tuple[int, ...]]:
    """`3x32x32` as (3, 32, 32), one for every --input. Raises: TersenetError for anything else."""
    for text in given or ():
        if not _SIZES.fullmatch(text):
            raise TersenetError(
                f"--input {text} must be channels x height x width, such as 3x224x224 (or 8x1000, 1x16x64x64 for a "
                "network of sequences or volumes)"
            )
    return [tuple(map(int, text.split("x"))) for text in given or ()]
