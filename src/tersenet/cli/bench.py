"""tersenet bench"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.cli import options
from tersenet.cli.console import columns, examples, note, note_random_weights, show
from tersenet.lowering.picture import check_picture, draw

if TYPE_CHECKING:
    from tersenet.lowering.bench import Bench

EXAMPLES = examples(
    "tersenet bench resnet18",
    "tersenet bench runs/r56/model --layers --threads 1",
    "tersenet bench resnet20 --batch 8 --peer eager --peer compile --json",
    "tersenet bench vgg16 --picture vgg16.svg",
    "tersenet bench resnet18 --half --peer openvino --peer eager",
)


def bench(
    model: options.ModelArgument,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    shapes: options.InputOption = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Images in a pass.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="For every runtime; by default torch's number.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Passes of each runtime.")] = 30,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help="eager, compile, onnxruntime, openvino, ncnn, mnn; repeatable. By default all but compile that are "
            "installed.",
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="All in bfloat16 (and 16-bit weights), not in float32.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Each convolution's kernel and times.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Bars of all runtimes: .svg or .png.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Lower a network for this machine and time it against other runtimes, in turns, all in one precision.

    Stop other programs first: the figures are wall-clock times.
    """
    sizes = options.input_sizes(shapes)
    if picture is not None:
        check_picture(picture)
    from tersenet import api
    from tersenet.lowering.bench import bench as run

    network, example = api.open_example(model, weights, base, sizes=sizes, batch=batch)
    chosen = {"peers": tuple(peers)} if peers else {}
    found, fast = run(network, example, threads=threads, rounds=rounds, half=half, **chosen)
    note_random_weights(model, weights)
    for name, reason in found.missing.items():
        note(f"note: {name} is left out: {reason}")
    if picture is not None:
        draw({f"{model}, {found.title}": found.timings}, picture)
    document = {"model": model, "input": list(example[0].shape), **found.to_dict(), "lowered": fast.report.to_dict()}
    text = f"\n\n{fast.report}" if layers else ""
    show(document, lambda: _table(found) + text, as_json)


def _table(found: Bench) -> str:
    own = found.timings["tersenet"].median_ms
    rows = (
        (
            name,
            f"{time.median_ms:.3f} ms",
            f"{time.low_ms:.3f} to {time.high_ms:.3f} ms",
            f"{time.median_ms / own:.2f}x",
            f"{time.error:.1e}",
        )
        for name, time in found.timings.items()
    )
    table = columns(("RUNTIME", "MEDIAN", "QUARTILES", "TIME / OURS", "ERROR"), rows)
    kind = "bfloat16" if found.half else "float32"
    how = f"batch {found.batch}, {found.threads} thread(s), {found.rounds} rounds in turns, {kind}"
    return f"{table}\n{how}, {found.environment['processor']}"
