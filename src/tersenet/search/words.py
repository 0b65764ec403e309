"""What the table and the page both say."""

from __future__ import annotations

from collections.abc import Sequence

from tersenet.report import format as f
from tersenet.search.result import LayerCurve, Point, Sensitivity

ALLOWED = 0.01
"""The drop whose rates the table and the page show: one point of top-1."""
_NAMES = {"top1": "Top-1", "metric": "Metric", "loss": "Loss"}


def score_name(result: Sensitivity) -> str:
    return _NAMES[result.score]


def baseline(result: Sensitivity) -> str:
    """`Top-1 91.70 % (917 of 1000 validation images), 95 % interval 89.83 to 93.25 %`"""
    found = result.baseline
    if found.top1 is None:
        return f"{score_name(result)} {f.number(result.value(found))} over {found.n:,} {f.clean(result.split)} samples"
    counted = f"{found.correct} of {found.n} {f.clean(result.split)} images"
    return f"Top-1 {f.percent(found.top1)} ({counted}), 95 % interval {f.interval(found.top1_low, found.top1_high)}"


def change(result: Sensitivity, point: Point) -> str:
    """What the score does at a point: `-3.2` points of top-1, or the difference of metric or loss; or `NaN`."""
    if point.accuracy is None:
        return "NaN"
    drop = result.drop(point)
    moved = drop if result.score == "loss" else -drop
    text = f"{100 * moved:+.1f}" if result.score == "top1" else f"{moved:+.3g}"
    return "0" if float(text) == 0 else text


def unit(result: Sensitivity) -> str:
    return "points of top-1" if result.score == "top1" else result.score


def rate_heads(rates: Sequence[float]) -> list[str]:
    return [f"{100 * rate:.4g} %" for rate in rates]


def headline(result: Sensitivity) -> str:
    """Which layer bears least and which most, at the middle one of the rates."""
    at = len(result.layers[0].points) // 2
    ordered = sorted(result.layers, key=lambda layer: -result.drop(layer.points[at]))
    rate = f"{100 * ordered[0].points[at].rate:.4g} %"
    worst = f"Without {rate} of its channels, {_says(result, ordered[0], at)}"
    return worst if len(ordered) == 1 else f"{worst}, and {_says(result, ordered[-1], at)}"


def _says(result: Sensitivity, layer: LayerCurve, at: int) -> str:
    if layer.points[at].accuracy is None:
        return f"{f.clean(layer.name)} leaves outputs that are not finite"
    moved = change(result, layer.points[at])
    return f"{f.clean(layer.name)} costs {'nothing' if moved == '0' else f'{moved} {unit(result)}'}"
