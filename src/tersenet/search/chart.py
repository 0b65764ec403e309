"""The page's charts: one small curve per layer, all on the same axes."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from tersenet.report import format as f
from tersenet.report.svg import AFTER, SETTINGS, SOFT, formatter, margins, new_figure, to_svg
from tersenet.search.result import LayerCurve, Sensitivity


def layer_chart(result: Sensitivity, layer: LayerCurve, key: str) -> str:
    """The score over the rate, and the whole network's as a dashed line. `key` makes the chart's ids unique."""
    whole = result.value(result.baseline)
    every = [value for each in result.layers for value in _values(result, each) if not math.isnan(value)]
    low, high = min(whole, *every), max(whole, *every)
    room = 0.06 * ((high - low) or 1.0)
    with mpl.rc_context(SETTINGS):
        figure = new_figure(340, 180)
        axes = figure.add_axes(margins(figure, 50, 24, 10, 8))
        axes.axhline(whole, color=SOFT, linewidth=1, linestyle=(0, (4, 4)))
        rates = [0.0, *(point.rate for point in layer.points)]
        values = [whole, *_values(result, layer)]
        axes.plot(rates, values, color=AFTER, marker="o", markersize=3.2)
        axes.yaxis.grid(True)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(formatter(_percent))
        axes.yaxis.set_major_formatter(formatter(_percent if result.score == "top1" else f.number))
        return to_svg(figure, key)


def _values(result: Sensitivity, layer: LayerCurve) -> list[float]:
    """A gap where nothing is known."""
    return [math.nan if point.accuracy is None else result.value(point.accuracy) for point in layer.points]


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"
