"""The report as one HTML page that needs nothing else: no script, no font, no image from anywhere.

Everything that comes from a report is escaped; the page's own policy forbids scripts and requests on top of that.
"""

from __future__ import annotations

import html
import json

import yaml

from tersenet.report import charts
from tersenet.report import format as f
from tersenet.report.curves import Panel, last_value, panels
from tersenet.report.group_maps import group_maps
from tersenet.report.parts import badge, fact_list, legend, note_list, page, pair_list, share_width, text, typeset
from tersenet.report.summary import Figure, Value, figures, flat, footnotes, headline, target_met
from tersenet.results import LayerRow, Measures, Report, StepResult

_HEADLINE = ("MACs", "Parameters", "Latency", "Top-1")


def render(report: Report) -> str:
    """The whole page as text, to be written as UTF-8."""
    body = "".join(
        (
            _header(report),
            _tiles(report),
            _layers_figure(report),
            _steps(report),
            _layers_table(report),
            _run(report),
        )
    )
    return page(f"{report.model}: compressed", body)


def _header(report: Report) -> str:
    recipe = report.recipe.get("name") or " + ".join(step.method for step in report.steps)
    chips = [("recipe", recipe), ("data", report.data), ("seed", report.recipe.get("seed"))]
    shown = "".join(
        f'<span class="chip">{name} <b>{text(value)}</b></span>' for name, value in chips if value not in (None, "")
    )
    if report.target:
        met = target_met(report)
        verdict = {True: ' <b class="good">met</b>', False: ' <b class="bad">missed</b>', None: ""}[met]
        shown += f'<span class="chip">target <b>{text(report.target)}</b>{verdict}</span>'
    sentence = typeset(headline(report))
    lead = f'<p class="lead">{sentence[0].upper()}{sentence[1:]}.</p>' if sentence else ""
    return f'<header><h1>{text(report.model)}</h1>{lead}<div class="chips">{shown}</div></header>'


def _tiles(report: Report) -> str:
    shown = figures(report)
    large = [figure for figure in shown if figure.label in _HEADLINE]
    rest = [(figure.label, _small(figure)) for figure in shown if figure.label not in _HEADLINE]
    tiles = "".join(_tile(figure) for figure in large)
    return f'<div class="tiles">{tiles}</div><div class="card">{fact_list(rest)}</div>'


def _tile(figure: Figure) -> str:
    known = figure.after != Value()
    amount, _, unit = figure.after.text.partition(" ")
    value = f"{typeset(amount)}<small>{unit}</small>" if known else figure.after.text
    lines = [f"from {typeset(figure.before.text)}"] if figure.before != Value() else []
    if figure.after.spread:
        lines.append(f"range {typeset(figure.after.spread)}")
    meter = ""
    if figure.share is not None:
        meter = f'<div class="meter"><i style="width:{share_width(figure.share)}"></i></div>'
    return (
        f'<div class="tile"><div class="top"><span>{figure.label}</span>{badge(figure.change, figure.good)}</div>'
        f'<div class="value{"" if known else " none"}">{value}</div>'
        f'<div class="from">{"<br>".join(lines)}</div>{meter}</div>'
    )


def _small(figure: Figure) -> str:
    change = f", {typeset(figure.change)}" if figure.change else ""
    return f'{typeset(figure.after.text)} <span class="was">from {typeset(figure.before.text)}{change}</span>'


_BEFORE_AFTER = legend(("before", "before", ""), ("after", "after", ""))


def _layers_figure(report: Report) -> str:
    if not report.layers:
        return ""
    chart = charts.layers_chart(report.layers, "layers")
    return f'<section><h2>What each layer kept</h2>{_BEFORE_AFTER}<div class="card wide">{chart}</div></section>'


def _steps(report: Report) -> str:
    if not report.steps:
        return ""
    points = [(f"{step.index + 1}. {step.method}", step.after) for step in report.steps]
    if not any(_same_network(step.after, report.before) for step in report.steps):
        points.insert(0, ("before", report.before))
    chart = charts.steps_chart(points, "steps")
    cards = "".join(_step(step) for step in report.steps)
    return f'<section><h2>Step by step</h2><div class="card wide">{chart}</div>{cards}</section>'


def _same_network(one: Measures, other: Measures) -> bool:
    return (one.macs, one.params, one.top1) == (other.macs, other.params, other.top1)


def _step(step: StepResult) -> str:
    after = step.after
    facts = [("MACs", f.count(after.macs)), ("Parameters", f.count(after.params))]
    if after.top1 is not None:
        facts.append(("Top-1", f.percent(after.top1)))
    if step.masked is not None and step.masked.top1 is not None:
        facts.append(("Top-1 with the zeros still in", f.percent(step.masked.top1)))
    facts.append(("Time", f.duration(step.seconds)))
    curves = "".join(_curve(panel, f"s{step.index}c{at}") for at, panel in enumerate(panels(step.curves)))
    charted = f'<div class="curves">{curves}</div>' if curves else ""
    return (
        f'<div class="card"><h3>{step.index + 1}. {text(step.method)}</h3>{fact_list(facts)}'
        f"{_equality(step)}{note_list(step.notes)}"
        f"{charted}{group_maps(step.maps)}{_fits(step)}{_settings(step)}</div>"
    )


def _fits(step: StepResult) -> str:
    if not step.fits:
        return ""
    rows = "".join(
        f'<tr><td class="name">{text(fit.name)}</td><td class="was">{text(fit.what)}</td>'
        f'<td class="right">{_pair(fit.before, fit.after)}</td><td class="right">{f.share(fit.unfitted)}</td>'
        f'<td class="right">{f.share(fit.error)}</td><td class="right">{f.share(fit.output_error)}</td></tr>'
        for fit in step.fits
    )
    heads = "".join(f'<th class="right">{head}</th>' for head in ("Left", "Unfitted", "Fitted", "Of the output"))
    return (
        "<details><summary>Layers fitted to calibration data, with the errors of their responses and of the network's "
        f"output</summary><table><thead><tr><th>Layer</th><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        "</details>"
    )


def _equality(step: StepResult) -> str:
    check = step.equality
    if check is None:
        return ""
    equal = check.relative <= check.tolerance
    verdict = badge("agree" if equal else "differ", equal)
    return (
        f'<p class="small" style="margin-top:12px">{verdict} Compact and masked network on {check.samples:,} samples: '
        f"largest difference {check.max_abs:.1e}, {check.relative:.1e} of the largest output; "
        f"tolerance {check.tolerance:.0e}.{text(check.remark)}</p>"
    )


def _curve(panel: Panel, ids: str) -> str:
    colors = ("after", "s2", "s3", "s4")
    show = f.percent if panel.percent else f.number
    key = legend(
        *((colors[at % 4], name, show(last_value(line))) for at, (name, line) in enumerate(panel.lines.items()))
    )
    chart = charts.curve_chart(list(panel.lines.values()), ids, percent=panel.percent)
    return f"<figure><figcaption><strong>{text(panel.title)}</strong>{key}</figcaption>{chart}</figure>"


def _settings(step: StepResult) -> str:
    pairs = pair_list(flat(step.settings))
    return f"<details><summary>Settings</summary>{pairs}</details>" if pairs else ""


def _layers_table(report: Report) -> str:
    if not report.layers:
        return ""
    most = max(1, *(max(row.macs_before, row.macs_after) for row in report.layers))
    rows = "".join(_layer(row, most) for row in report.layers)
    heads = ("Layer", "Kind", "r:In", "r:Out", "r:MACs", "", "r:Change", "r:Parameters")
    cells = "".join(
        f'<th class="right">{head[2:]}</th>' if head.startswith("r:") else f"<th>{head}</th>" for head in heads
    )
    return (
        f'<section><h2>Layers</h2>{_BEFORE_AFTER}<div class="card wide"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _layer(row: LayerRow, most: int) -> str:
    name = text(row.name) or "(model)"
    larger = max(row.macs_before, row.macs_after)
    left = row.macs_after / larger if larger else 0.0
    bar = (
        f'<span class="bar" style="width:{share_width(larger / most)}"><i style="width:{share_width(left)}"></i></span>'
    )
    note = f" <small>{text(row.note)}</small>" if row.note else ""
    return (
        f'<tr><td class="name" title="{name}">{name}{note}</td><td class="was">{text(row.kind)}</td>'
        f'<td class="right">{_pair(row.in_before, row.in_after)}</td>'
        f'<td class="right">{_pair(row.out_before, row.out_after)}</td>'
        f'<td class="right" title="{row.macs_before:,} → {row.macs_after:,}">{f.count(row.macs_after)}</td>'
        f'<td class="plot">{bar}</td><td class="right">{typeset(f.change(row.macs_before, row.macs_after))}</td>'
        f'<td class="right" title="{row.params_before:,} → {row.params_after:,}">{f.count(row.params_after)}</td></tr>'
    )


def _pair(before: int, after: int) -> str:
    return str(after) if before == after else f'<span class="was">{before} → </span>{after}'


def _run(report: Report) -> str:
    command = '<p class="soft small">Made from Python.</p>'
    if report.command:
        command = f"<pre>{text(report.command)}</pre>"
    environment = pair_list(flat(report.environment)) or '<p class="soft small">not recorded</p>'
    recipe = html.escape(yaml.safe_dump(json.loads(json.dumps(report.recipe, default=str)), sort_keys=False))
    return (
        f'<section><h2>How it was made</h2><div class="card">{command}'
        f"<details><summary>Recipe, with every default</summary><pre>{recipe}</pre></details></div>"
        f'<div class="two"><div class="card"><h3>Exact figures</h3>{_exact(report)}</div>'
        f'<div class="card"><h3>Environment</h3>{environment}</div></div>'
        f"{note_list([*report.notes, *footnotes(report)])}</section>"
        f"<footer>tersenet {text(report.tersenet)}, report format {report.format}</footer>"
    )


def _exact(report: Report) -> str:
    before, after = report.before, report.after
    exact = (
        ("MACs", before.macs, after.macs),
        ("Parameters", before.params, after.params),
        ("Bytes", before.bytes, after.bytes),
        ("Peak memory, bytes", before.peak_memory_bytes, after.peak_memory_bytes),
    )
    rows = "".join(
        f'<tr><td>{label}</td><td class="right">{_whole(old)}</td><td class="right">{_whole(new)}</td></tr>'
        for label, old, new in exact
    )
    heads = '<th></th><th class="right">before</th><th class="right">after</th>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
