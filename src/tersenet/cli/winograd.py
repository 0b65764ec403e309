"""tersenet winograd"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tersenet.cli import options
from tersenet.cli.console import columns, examples, show
from tersenet.cli.options import JsonOption
from tersenet.errors import TersenetError
from tersenet.ops.cook_toom import POINT_SETS, Matrix, Transforms, cook_toom, text

INFO_EXAMPLES = examples(
    "tersenet winograd info F4",
    "tersenet winograd info 'F(4,5)' --points lavin",
    "tersenet winograd info F2 --points 0,1/2,-1/2 --json",
)

LATENCY_EXAMPLES = examples(
    "tersenet winograd latency resnet20 --out table.json",
    "tersenet winograd latency timm:resnet18 --input 3x224x224 --bits 8 --bits 16 --out table.json",
)

app = typer.Typer(help="Winograd's minimal filtering F(m, r).", no_args_is_help=True)

_NAME = re.compile(r"F\(?(?P<m>\d+)(?:x(?P=m))?(?:,\s*(?P<r>\d+)(?:x(?P=r))?)?\)?", re.IGNORECASE)
_LARGEST_TILE = 16


@app.command(epilog=INFO_EXAMPLES)
def info(
    name: Annotated[str, typer.Argument(metavar="F", help="F4 for F(4x4, 3x3), F(4,5) for F(4x4, 5x5).")],
    points: Annotated[
        str, typer.Option("--points", metavar="NAME|P,P,..", help=f"{', '.join(POINT_SETS)}, or m + r - 2 fractions.")
    ] = "balanced",
    bits: Annotated[int, typer.Option("--bits", metavar="N", min=2, max=32, help="Of the quantized errors.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show the transforms of F(m, r), its multiplications, and the error of a layer in float32 and quantized."""
    found = cook_toom(*parse_name(name), points.split(",") if re.search(r"[\d,]", points) else points)
    from tersenet.nn.winograd_error import layer_error

    errors = {
        "float32": layer_error(found),
        f"{bits}_bits_per_tap": layer_error(found, bits),
        f"{bits}_bits_per_tensor": layer_error(found, bits, per_tap=False),
    }
    facts = describe(found) | {"relative_error": errors}
    show(facts, lambda: _text(found, facts), as_json)


@app.command(epilog=LATENCY_EXAMPLES)
def latency(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The table to write, .json.", show_default=False)],
    bits: Annotated[
        list[int] | None, typer.Option("--bits", min=2, max=32, help="Beside floating point; again for more.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 1,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    shapes: options.InputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what each convolution of a network costs on this machine: the table that `winas` chooses by."""
    if out.suffix != ".json":
        raise TersenetError(f"{out} must end in .json")
    from tersenet import api

    network, example = api.open_example(model, weights, base, sizes=options.input_sizes(shapes), batch=2)
    table = api.latency_table(network, example, bits=(None, *(bits or ())), batch=batch)
    table.save(out)
    rows = [
        (
            "x".join(map(str, row.shape.kernel)),
            f"{row.shape.in_channels} -> {row.shape.out_channels}",
            "x".join(map(str, row.shape.map)),
            "direct" if row.tile == "direct" else f"F{row.tile}",
            "float" if row.bits is None else str(row.bits),
            f"{row.ms:.3f}",
            row.kernel,
        )
        for row in table.rows
    ]
    head = ("KERNEL", "CHANNELS", "MAP", "TILE", "BITS", "MS", "TIMED")
    show(table.model_dump(mode="json"), lambda: f"{columns(head, rows)}\n\n{out} written", as_json)


def parse_name(name: str) -> tuple[int, int]:
    """`F4` as (4, 3), `F(4,5)` and `F(4x4,5x5)` as (4, 5). Raises: TersenetError for anything else, and large tiles."""
    match = _NAME.fullmatch(name.replace(" ", ""))
    if match is None:
        raise TersenetError(f"{name} must be F4, which is F(4x4, 3x3), or with the size of the filter F(4,5)")
    m, r = int(match["m"]), int(match["r"] or 3)
    if not (m and r) or m + r - 1 > _LARGEST_TILE:
        raise TersenetError(f"{name}: m and r must be at least 1 and the tile m + r - 1 at most {_LARGEST_TILE}")
    return m, r


def describe(found: Transforms) -> dict[str, Any]:
    """All that follows from the matrices alone. Fractions are text."""
    return {
        "m": found.m,
        "r": found.r,
        "tile": found.t,
        "points": [*map(str, found.points), "inf"],
        "at": _plain(found.at),
        "g": _plain(found.g),
        "bt": _plain(found.bt),
        "multiplications_per_output": float(found.multiplications()),
        "direct_multiplications_per_output": found.r**2,
        "weight_growth": found.t**2 / found.r**2,
        "largest_growth": {name: float(value) for name, value in found.growth().items()},
        "condition_numbers": found.condition_numbers(),
        "error_amplification": {"per_tap": found.amplification(), "per_tensor": found.amplification(per_tap=False)},
    }


def _plain(matrix: Matrix) -> list[list[str]]:
    return [[str(value) for value in row] for row in matrix]


def _text(found: Transforms, facts: dict[str, Any]) -> str:
    ours, direct = facts["multiplications_per_output"], facts["direct_multiplications_per_output"]
    growth, condition, gain = facts["largest_growth"], facts["condition_numbers"], facts["error_amplification"]
    rows = [
        ("multiplications", f"{ours:.4g} per output, direct {direct} ({direct / ours:.3g} times as many)"),
        ("weights", f"{facts['weight_growth']:.3g} times as many after the transform"),
        (
            "values grow",
            f"input {growth['input']:.4g}, weight {growth['weight']:.4g}, output {growth['output']:.4g} at most",
        ),
        ("condition", f"B {condition['bt']:.3g}, A {condition['at']:.3g}, G {condition['g']:.3g}"),
        ("amplification", f"{gain['per_tap']:.3g} with errors per tap, {gain['per_tensor']:.3g} with the same for all"),
        *((f"error {name.replace('_', ' ')}", f"{value:.3g}") for name, value in facts["relative_error"].items()),
    ]
    head = f"F({found.m}x{found.m}, {found.r}x{found.r}), tile {found.t}, points {text(found.points)} and infinity"
    matrices = [
        f"{title} =\n{_aligned(matrix)}" for title, matrix in (("A^T", found.at), ("G", found.g), ("B^T", found.bt))
    ]
    return "\n\n".join((head, *matrices, columns(("WHAT", "VALUE"), rows)))


def _aligned(matrix: Matrix) -> str:
    cells = _plain(matrix)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  " + "  ".join(map(str.rjust, row, widths)) for row in cells)
