"""tersenet measure"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.cli import options
from tersenet.cli.console import columns, examples, note_random_weights, show

if TYPE_CHECKING:
    from tersenet.measuring.macs import LayerCost
    from tersenet.measuring.winograd_table import WinogradTable
    from tersenet.results import Measures

EXAMPLES = examples(
    "tersenet measure resnet56",
    "tersenet measure runs/r56/model --layers",
    "tersenet measure timm:resnet18",
    "tersenet measure my_package.nets:make --input 3x224x224 --json",
)


def measure(
    model: options.ModelArgument,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    shapes: options.InputOption = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="One row per convolution and linear layer; Winograd layers once more.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Parameters, MACs, bytes, peak memory and latency of one image."""
    sizes = options.input_sizes(shapes)
    from tersenet import api
    from tersenet.measuring.macs import layer_table
    from tersenet.measuring.winograd_table import winograd_table

    network, example = api.open_example(model, weights, base, sizes=sizes)
    found = api.measure(network, example)
    table = layer_table(network, example) if layers else {}
    winograd = winograd_table(network, example) if layers else None
    document = {
        "model": model,
        "input": list(example[0].shape),
        **({"more_inputs": [list(x.shape) for x in example[1:]]} if len(example) > 1 else {}),
        **found.model_dump(mode="json"),
        **({"layers": {name: vars(cost) for name, cost in table.items()}} if layers else {}),
        **({"winograd": asdict(winograd)} if winograd is not None else {}),
    }
    note_random_weights(model, weights)
    show(document, lambda: "\n\n".join(filter(None, (describe(found), _layers(table), _winograd(winograd)))), as_json)


def describe(found: Measures) -> str:
    """One figure per line, with its unit."""
    rows = [
        ("parameters", f"{found.params:,}"),
        ("MACs", f"{found.macs:,}"),
        ("size", f"{found.bytes:,} bytes"),
    ]
    if found.peak_memory_bytes is not None:
        rows.append(("peak memory", f"{found.peak_memory_bytes:,} bytes"))
    if found.latency is not None:
        time = found.latency
        spread = f"quartiles {time.low_ms:.2f} to {time.high_ms:.2f}"
        how = f"{time.runs} runs, batch {time.batch}, {time.threads} thread(s), {time.device}"
        rows.append(("latency", f"{time.median_ms:.2f} ms ({spread}; {how})"))
    if found.uncounted:
        rows.append(("not counted", ", ".join(found.uncounted)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _layers(table: dict[str, LayerCost]) -> str:
    if not table:
        return ""
    rows = (
        (
            name or "(model)",
            f"{cost.in_channels} -> {cost.out_channels}",
            f"{cost.macs:,}",
            f"{cost.params:,}",
            cost.kind,
        )
        for name, cost in table.items()
    )
    return columns(("LAYER", "CHANNELS", "MACS", "PARAMS", "KIND"), rows)


def _winograd(table: WinogradTable | None) -> str:
    """The Winograd-aware reference's report: what computes each weight, and three totals."""
    if table is None:
        return ""
    rows = (
        (
            row.name,
            "x".join(map(str, row.shape)),
            "x".join(map(str, row.input_shape)),
            row.winograd or "-",
            row.flex or "-",
            str(row.bits or "FP"),
            f"{row.size / 1000:.3f}",
            f"{100 * row.size / table.in_table:.2f}",
        )
        for row in table.rows
    )
    head = ("WEIGHT", "SHAPE", "INPUT", "WINOGRAD", "FLEX", "BITS", "SIZE (K)", "SIZE (%)")
    totals = (("in the table", table.in_table), ("all", table.parameters), ("trainable", table.trainable))
    lines = [f"parameters, {name + ':':<13} {count / 1000:,.3f} k" for name, count in totals]
    return "\n".join([columns(head, rows), *lines])
