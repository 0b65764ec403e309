"""The analysis as one HTML page that needs nothing else, in the report's look."""

from __future__ import annotations

import math
from collections.abc import Mapping

import yaml

from tersenet.report import format as f
from tersenet.report.parts import legend, note_list, page, pair_list, share_width, text, typeset
from tersenet.report.summary import flat
from tersenet.search import words
from tersenet.search.chart import layer_chart
from tersenet.search.result import LayerCurve, Point, Sensitivity


def render(result: Sensitivity) -> str:
    """The whole page as text, to be written as UTF-8."""
    body = "".join((_header(result), _table(result), _curves(result), _skipped(result.skipped), _made(result)))
    return page(f"{result.model}: sensitivity", body)


def _header(result: Sensitivity) -> str:
    settings = result.settings
    chips = [("data", result.data), ("importance", settings.get("importance")), ("residual", settings.get("residual"))]
    shown = "".join(f'<span class="chip">{name} <b>{text(value)}</b></span>' for name, value in chips)
    lead = f"{words.baseline(result)}. {words.headline(result)}."
    return (
        f'<header><h1>{text(result.model)}: sensitivity</h1><p class="lead">{typeset(lead)}</p>'
        f'<div class="chips">{shown}</div></header>'
    )


def _table(result: Sensitivity) -> str:
    first = result.layers[0]
    rates = words.rate_heads([point.rate for point in first.points])
    heads = ["Channels", "MACs", *rates, *(["1 point"] if result.score == "top1" else [])]
    cells = "".join(f'<th class="right">{head}</th>' for head in heads)
    drops = [result.drop(point) for layer in result.layers for point in layer.points]
    most = max(1e-12, *filter(math.isfinite, drops))
    rows = "".join(_row(result, layer, most) for layer in result.layers)
    unit = "top-1 in points" if result.score == "top1" else result.score
    last = " The last column is the largest rate up to which no more than one point is lost." * (result.score == "top1")
    return (
        f"<section><h2>Layer by layer</h2>"
        f'<p class="soft small">The change of {unit} when that share of one layer’s channels is set to zero and all '
        "else is whole. MACs: the share of the network’s multiply-adds in layers that make or read these channels, "
        f'which is the most that pruning them can save.{last}</p><div class="card wide"><table><thead><tr>'
        f"<th>Layer</th>{cells}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(result: Sensitivity, layer: LayerCurve, most: float) -> str:
    name = text(layer.name) or "(model)"
    cells = "".join(_cell(result, layer, point, most) for point in layer.points)
    if result.score == "top1":
        cells += f'<td class="right">{words.rate_heads([result.layer_rate(layer, words.ALLOWED)])[0]}</td>'
    return (
        f'<tr><td class="name" title="{text(", ".join(layer.producers))}">{name}</td>'
        f'<td class="right">{layer.channels}</td><td class="right">{100 * layer.macs_share:.1f} %</td>{cells}</tr>'
    )


def _cell(result: Sensitivity, layer: LayerCurve, point: Point, most: float) -> str:
    shade = share_width(0.55 * min(1.0, max(0.0, result.drop(point)) / most))
    saved = 100 * (1 - point.macs / result.macs) if result.macs else 0.0
    tip = f"{point.removed} of {layer.channels} channels, {saved:.1f} % of the MACs"
    return (
        f'<td class="right" title="{tip}" style="background:color-mix(in srgb, var(--s2) {shade}, transparent);'
        f'padding-left:10px">{typeset(words.change(result, point))}</td>'
    )


def _curves(result: Sensitivity) -> str:
    shown = "".join(_curve(result, layer, f"layer{at}") for at, layer in enumerate(result.layers))
    return (
        f'<section><h2>{words.score_name(result)} against rate</h2><p class="soft small">Rate: the share of the '
        "channels that is set to zero. Dashed: the whole network. All charts have the same axes.</p>"
        f'<div class="card"><div class="curves" style="margin-top:0">{shown}</div></div></section>'
    )


def _curve(result: Sensitivity, layer: LayerCurve, key: str) -> str:
    facts = legend(("after", f"{layer.channels} channels", f"{100 * layer.macs_share:.1f} % of the MACs"))
    chart = layer_chart(result, layer, key)
    return f"<figure><figcaption><strong>{text(layer.name)}</strong>{facts}</figcaption>{chart}</figure>"


def _skipped(skipped: Mapping[str, list[str]]) -> str:
    notes = note_list([f"{', '.join(names)}: {why}" for why, names in skipped.items()])
    return f'<section><h2>Left out</h2><div class="card">{notes}</div></section>' if notes else ""


def _made(result: Sensitivity) -> str:
    command = f"<pre>{text(result.command)}</pre>" if result.command else '<p class="soft small">Made from Python.</p>'
    rates = ""
    if result.score == "top1":
        listed = "".join(
            f"{text(line)}\n" for line in yaml.safe_dump({"rates": result.rates()}, sort_keys=False).splitlines()
        )
        title = "Rates that each cost at most one point, for a recipe"
        rates = f"<details><summary>{title}</summary><pre>{listed}</pre></details>"
    return (
        f'<section><h2>How it was made</h2><div class="card">{command}{rates}{note_list(result.notes)}</div>'
        f'<div class="two"><div class="card"><h3>Settings</h3>{pair_list(flat(result.settings))}</div>'
        f'<div class="card"><h3>Environment</h3>{pair_list(flat(result.environment))}</div></div></section>'
        f"<footer>tersenet {text(result.tersenet)}, sensitivity format {result.format}, "
        f"{f.count(result.macs)} MACs</footer>"
    )
