"""tersenet measure"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.cli import options
from tersenet.cli.console import columns, examples, note_random_weights, show

if TYPE_CHECKING:
    from tersenet.measuring.macs import LayerCost
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
    layers: Annotated[bool, typer.Option("--layers", help="One row per convolution and linear layer.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Parameters, MACs, bytes, peak memory and latency of one image."""
    sizes = options.input_sizes(shapes)
    from tersenet import api
    from tersenet.measuring.macs import layer_table

    network, example = api.open_example(model, weights, base, sizes=sizes)
    found = api.measure(network, example)
    table = layer_table(network, example) if layers else {}
    document = {
        "model": model,
        "input": list(example[0].shape),
        **({"more_inputs": [list(x.shape) for x in example[1:]]} if len(example) > 1 else {}),
        **found.model_dump(mode="json"),
        **({"layers": {name: vars(cost) for name, cost in table.items()}} if layers else {}),
    }
    note_random_weights(model, weights)
    show(document, lambda: "\n\n".join(filter(None, (describe(found), _layers(table)))), as_json)


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
