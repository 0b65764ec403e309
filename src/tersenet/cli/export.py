"""tersenet export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersenet.cli import options
from tersenet.cli.console import examples, note_random_weights, show
from tersenet.cli.measure import parse_shape
from tersenet.errors import TersenetError

EXAMPLES = examples(
    "tersenet export runs/r56/model r56.pt2",
    "tersenet export resnet20 resnet20.onnx --weights resnet20-12fca82f.th",
)


def export(
    model: options.ModelArgument,
    file: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .pt2 or .onnx.", show_default=False)],
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    shape: Annotated[
        str | None, typer.Option("--input", metavar="CxHxW", help="Input size; by default the model's own.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Write a network as an ExportedProgram (.pt2) or ONNX file, which run without tersenet and for any batch size.

    In Python: torch.export.load("OUT.pt2").module() gives a function of a batch of images.
    """
    size = parse_shape(shape) if shape else None
    if file.suffix not in (".pt2", ".onnx"):
        raise TersenetError(f"{file} must end in .pt2 (torch.export) or .onnx: these are the formats that are written")
    import torch

    from tersenet import api

    network, own = api.open_model(model, weights, base)
    # A batch of 2: torch.export takes a size of 1 for a constant, and the file would then serve single images only.
    api.export(network, file, torch.randn(2, *(size or own)))
    document = {"model": model, "file": str(file), "bytes": file.stat().st_size}
    note_random_weights(model, weights)
    show(document, lambda: f"{file} written, {document['bytes']:,} bytes", as_json)
