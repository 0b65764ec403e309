"""tersenet measure"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.cli import options
from tersenet.cli.console import columns, examples, note_random_weights, show
from tersenet.errors import TersenetError

if TYPE_CHECKING:
    from tersenet.measuring.macs import LayerCost
    from tersenet.measuring.winograd_table import WinogradTable
    from tersenet.measuring.workload import Workload
    from tersenet.results import Measures

EXAMPLES = examples(
    "tersenet measure resnet56",
    "tersenet measure runs/r56/model --layers",
    "tersenet measure runs/sparse/model --workload --data cifar10:DIR",
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
    workload: Annotated[
        bool,
        typer.Option(
            "--workload", help="Multiplications where zero weights and activations of sparse layers count not."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="NAME[:DIR]", help="Of --workload: test images in place of noise."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images that --workload counts on.")] = 100,
    as_json: options.JsonOption = False,
) -> None:
    """Parameters, MACs, bytes, peak memory and latency of one image."""
    if data is not None and not workload:
        raise TersenetError("--data is for --workload, which counts on images: give both")
    sizes = options.input_sizes(shapes)
    from tersenet import api
    from tersenet.measuring.macs import layer_table
    from tersenet.measuring.winograd_table import winograd_table

    network, example = api.open_example(model, weights, base, sizes=sizes)
    found = api.measure(network, example)
    table = layer_table(network, example) if layers else {}
    winograd = winograd_table(network, example) if layers else None
    counted = api.workload(network, data, samples) if workload else None
    document = {
        "model": model,
        "input": list(example[0].shape),
        **({"more_inputs": [list(x.shape) for x in example[1:]]} if len(example) > 1 else {}),
        **found.model_dump(mode="json"),
        **({"layers": {name: vars(cost) for name, cost in table.items()}} if layers else {}),
        **({"winograd": asdict(winograd)} if winograd is not None else {}),
        **({"workload": {"data": data or "noise", **counted.document()}} if counted is not None else {}),
    }
    note_random_weights(model, weights)
    parts = describe(found), _layers(table), _winograd(winograd), _workload(counted, data)
    show(document, lambda: "\n\n".join(filter(None, parts)), as_json)


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


def _workload(found: Workload | None, data: str | None) -> str:
    """One row per layer, and totals: of the layers with a mask or in the Winograd domain, and of the network."""
    if found is None:
        return ""
    rows = [
        (
            row.name,
            row.kind,
            f"{row.weight_density:.3f}",
            f"{row.activation_density:.3f}",
            *(f"{round(value):,}" for value in (row.dense, row.exact, row.by_means)),
            *("-" if value is None else f"{round(value):,}" for value in (row.spatial, row.native)),
        )
        for row in found.rows
    ]
    names = ("dense", "exact", "by_means", "spatial", "native")
    for title, only in (("sparse layers", True), ("all layers", False)):
        rows.append((title, "", "", "", *(f"{round(found.total(name, only)):,}" for name in names)))
    head = ("LAYER", "KIND", "WEIGHTS", "ACTIVATIONS", "DENSE", "EXACT", "BY MEANS", "SPATIAL", "NATIVE")
    where = f"test images of {data}" if data else "images of noise: give --data for activations that mean something"
    lines = [columns(head, rows), f"multiplications per image, counted on {found.images} {where}"]
    if any(row.kind != "dense" for row in found.rows):
        # None at all: every activation, or every weight, is zero.
        counts = [(found.total("dense", only), found.total("exact", only)) for only in (True, False)]
        fewer = [f"{dense / exact:.2f}" if exact else "infinitely many" for dense, exact in counts]
        lines.append(f"{fewer[0]} times fewer than dense in the sparse layers, {fewer[1]} in all")
    else:
        lines.append("no layer has a mask or its weight in the Winograd domain: see the method sparse_winograd")
    return "\n".join(lines)
