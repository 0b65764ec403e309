"""The page's charts: layers, steps and training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator

from tersenet.report import format as f
from tersenet.report.svg import AFTER, BEFORE, INK, LINE, SERIES, SETTINGS, SOFT, formatter, margins, new_figure, to_svg
from tersenet.results import LayerRow, Measures

_NAMES_UP_TO = 26  # layers; beyond that their names can't be read under the bars
_NAME_LENGTH = 16
_WIDTH = 1080


def layers_chart(layers: Sequence[LayerRow], key: str) -> str:
    """Output channels and MACs of every layer, what is left drawn over what was there. `key` makes its ids unique."""
    named = len(layers) <= _NAMES_UP_TO
    bottom = _label_room(layers) if named else 22
    with mpl.rc_context(SETTINGS):
        figure = new_figure(_WIDTH, 300 + bottom)
        top = figure.add_axes(margins(figure, 58, bottom + 158, 8, 26))
        low = figure.add_axes(margins(figure, 58, bottom, 8, 184))
        _pairs(top, "Output channels", [(row.out_before, row.out_after) for row in layers])
        _pairs(low, "MACs", [(row.macs_before, row.macs_after) for row in layers])
        top.set_xticks([])
        _layer_ticks(top, low, layers, named)
        return to_svg(figure, key, [_tip(row) for row in layers])


def steps_chart(points: Sequence[tuple[str, Measures]], key: str) -> str:
    """MACs as bars and, where it was measured, top-1 with its interval as dots: one line per named network."""
    scored = any(measures.top1 is not None for _, measures in points)
    places = list(range(len(points)))
    with mpl.rc_context(SETTINGS):
        figure = new_figure(_WIDTH, 58 + 30 * len(points))
        names = [_short(name, 30) for name, _ in points]
        left = 24 + 6.6 * max(map(len, names))
        split = left + 400 if scored else _WIDTH - 70
        bars = figure.add_axes(margins(figure, left, 24, _WIDTH - split, 26))
        bars.barh(
            places, [m.macs for _, m in points], height=0.5, color=[BEFORE, *[AFTER] * len(points)][: len(points)]
        )
        for place, (_, measures) in zip(places, points, strict=True):
            bars.annotate(
                f.count(measures.macs), (measures.macs, place), (6, 0), textcoords="offset points", va="center"
            )
        bars.set_yticks(places, names)
        bars.tick_params(axis="y", labelcolor=INK)
        _plain_axis(bars, "MACs", bars.xaxis, f.tick)
        bars.set_xlim(0, 1.02 * max(1, *(m.macs for _, m in points)))
        axes = [bars]
        if scored:
            dots = figure.add_axes(margins(figure, split + 100, 24, 84, 26))
            _dots(dots, [measures for _, measures in points])
            axes.append(dots)
        for each in axes:
            each.set_ylim(len(points) - 0.5, -0.5)
        return to_svg(figure, key)


def curve_chart(series: Sequence[Sequence[tuple[float, float]]], key: str, *, percent: bool = False) -> str:
    """Lines over epochs, one per series of (epoch, value); a gap where a value is missing."""
    with mpl.rc_context(SETTINGS):
        figure = new_figure(340, 190)
        axes = figure.add_axes(margins(figure, 46, 24, 10, 10))
        for index, line in enumerate(series):
            xs, ys = [x for x, _ in line], [y for _, y in line]
            color = SERIES[index % len(SERIES)]
            axes.plot(xs, ys, color=color, marker="o", markersize=3.2 if len(line) == 1 else 0)
        axes.yaxis.grid(True)
        axes.margins(x=0.02, y=0.08)
        low, high = _range(series)
        if not percent and (0 <= low < high / 2 or 0 < low == high):
            axes.set_ylim(0, 1.08 * high)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(formatter(_as_percent if percent else f.number))
        return to_svg(figure, key)


def _pairs(axes: Axes, title: str, values: Sequence[tuple[int, int]]) -> None:
    count = len(values)
    width = min(0.8, 64 / ((_WIDTH - 66) / max(1, count)))  # at most 64 pixels: three layers aren't three towers
    axes.bar(range(count), [before for before, _ in values], width, color=BEFORE)
    axes.bar(range(count), [after for _, after in values], width, color=AFTER)
    for index in range(count):
        axes.axvspan(index - 0.5, index + 0.5, facecolor="none", gid=f"tip{index}")
    axes.set_xlim(-0.5, max(1, count) - 0.5)
    _plain_axis(axes, title, axes.yaxis, f.tick)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _dots(axes: Axes, measured: Sequence[Measures]) -> None:
    for place, measures in enumerate(measured):
        if measures.top1 is None:
            continue
        color = SOFT if place == 0 else AFTER
        accuracy = measures.accuracy
        right = measures.top1
        if accuracy and accuracy.top1_low is not None and accuracy.top1_high is not None:
            axes.plot([accuracy.top1_low, accuracy.top1_high], [place, place], color=color, linewidth=2, alpha=0.45)
            right = accuracy.top1_high
        axes.plot([measures.top1], [place], "o", color=color, markersize=7)
        axes.annotate(f.percent(measures.top1), (right, place), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks([])
    axes.margins(x=0.08)
    _plain_axis(axes, "Top-1, with its 95 % interval", axes.xaxis, _as_percent)


def _range(series: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    values = [value for line in series for _, value in line if not math.isnan(value)]
    return min(values, default=0.0), max(values, default=0.0)


def _plain_axis(axes: Axes, title: str, axis: Axis, show: Callable[[float], str]) -> None:
    """A title above, a grid across, a handful of ticks."""
    axes.set_title(title, loc="left", fontsize=11, color=SOFT, pad=9)
    axis.grid(True)
    axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(formatter(show))


def _as_percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _layer_ticks(top: Axes, axes: Axes, layers: Sequence[LayerRow], named: bool) -> None:
    """Every name where there is room; else the top-level parts of the network, or plain numbers if it has none."""
    if named:
        angle = 0 if len(layers) <= 6 else 40
        names = [_short(row.name or "(model)", _NAME_LENGTH) for row in layers]
        side = "right" if angle else "center"
        axes.set_xticks(range(len(layers)), names, rotation=angle, ha=side, rotation_mode="anchor")
        return
    parts: dict[str, list[int]] = {}
    for index, row in enumerate(layers):
        parts.setdefault(row.name.partition(".")[0], []).append(index)
    if not 1 < len(parts) <= 14:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        return
    axes.set_xticks([(at[0] + at[-1]) / 2 for at in parts.values()], [_short(part, 14) for part in parts])
    for start in [at[0] for at in parts.values()][1:]:
        for each in (top, axes):
            each.axvline(start - 0.5, color=LINE, linewidth=1)


def _label_room(layers: Sequence[LayerRow]) -> int:
    if len(layers) <= 6:
        return 22
    return 26 + round(4.4 * max(len(_short(row.name, _NAME_LENGTH)) for row in layers))


def _tip(row: LayerRow) -> str:
    name = f.clean(row.name) or "(model)"
    return (
        f"{name}: {row.out_before} → {row.out_after} channels, "
        f"{f.count(row.macs_before)} → {f.count(row.macs_after)} MACs"
    )


def _short(text: str, length: int) -> str:
    """The end of a long name: that is where names of layers differ."""
    text = f.clean(text)
    return text if len(text) <= length else "…" + text[1 - length :]
