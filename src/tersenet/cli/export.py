"""tersenet export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tersenet.cli import options
from tersenet.cli.console import examples, note_random_weights, show
from tersenet.errors import TersenetError

EXAMPLES = examples(
    "tersenet export runs/r56/model r56.pt2",
    "tersenet export resnet20 resnet20.onnx --weights resnet20-12fca82f.th",
    "tersenet export runs/wa/model wa.onnx --quantized plain",
)


def export(
    model: options.ModelArgument,
    file: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .pt2 or .onnx.", show_default=False)],
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    shapes: options.InputOption = None,
    quantized: Annotated[
        Literal["folded", "plain"],
        typer.Option(
            help="Winograd and quantized layers: with integer weights and their rounding (QuantizeLinear and "
            "DequantizeLinear in ONNX), or as plain convolutions without any."
        ),
    ] = "folded",
    as_json: options.JsonOption = False,
) -> None:
    """Write a network as an ExportedProgram (.pt2) or ONNX file, which run without tersenet and for any batch size.

    In Python: torch.export.load("OUT.pt2").module() gives a function of a batch of images.
    """
    sizes = options.input_sizes(shapes)
    if file.suffix not in (".pt2", ".onnx"):
        raise TersenetError(f"{file} must end in .pt2 (torch.export) or .onnx: these are the formats that are written")
    from tersenet import api

    network, example = api.open_example(model, weights, base, sizes=sizes, batch=2)
    api.export(network, file, example, quantized=quantized)
    document = {"model": model, "file": str(file), "bytes": file.stat().st_size}
    note_random_weights(model, weights)
    show(document, lambda: f"{file} written, {document['bytes']:,} bytes", as_json)
