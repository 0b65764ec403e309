"""The headline figures of a report, before and after: what the table prints and the page shows as tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from tersenet.errors import TersenetError
from tersenet.recipe_target import Target
from tersenet.report import format as f
from tersenet.results import Measures, Report


@dataclass(frozen=True)
class Value:
    """A figure ready to print, and its spread where that is known."""

    text: str = "not measured"
    spread: str = ""


@dataclass(frozen=True)
class Figure:
    """One quantity before and after. `good`: did it get better. `share`: after / before, where less is better."""

    label: str
    before: Value
    after: Value
    change: str = ""
    good: bool | None = None
    share: float | None = None


def figures(report: Report) -> list[Figure]:
    """MACs, parameters, latency and top-1, the headline; then size, memory, and top-5 and the user's own metric.

    What was measured neither before nor after is left out, but for top-1.
    """
    before, after = report.before, report.after
    found = [
        _amount("MACs", before.macs, after.macs, f.count),
        _amount("Parameters", before.params, after.params, f.count),
        _latency(before, after),
        _score("Top-1", before.top1, after.top1, _interval(before), _interval(after)),
        _amount("Size", before.bytes, after.bytes, f.size),
        _amount("Peak memory", before.peak_memory_bytes, after.peak_memory_bytes, f.size),
        *_other_scores(before, after),
    ]
    return [figure for figure in found if figure is not None]


def headline(report: Report) -> str:
    """One sentence: `50.4 % fewer MACs, 49.6 % fewer parameters, 1.93x faster, top-1 -0.48 points`."""
    said: list[str] = []
    for figure in figures(report):
        if figure.label in ("MACs", "Parameters") and figure.change not in ("", "same"):
            noun = "MACs" if figure.label == "MACs" else "parameters"
            said.append(f"{figure.change[1:]} {'fewer' if figure.change[0] == '-' else 'more'} {noun}")
        elif figure.label == "Latency" and figure.change not in ("", "same"):
            said.append(figure.change)
        elif figure.label == "Top-1" and figure.change:
            said.append(f"top-1 {'the same' if figure.change == 'same' else figure.change}")
    return ", ".join(said)


def target_met(report: Report) -> bool | None:
    """Whether the final network meets the run's target; None without one, or for a kind that isn't a count."""
    if report.target is None:
        return None
    try:
        target = Target.parse(report.target)
    except TersenetError:
        return None
    if target.kind not in ("macs", "params"):
        return None
    before, after = (getattr(measures, target.kind) for measures in (report.before, report.after))
    return after <= target.limit(before)


def footnotes(report: Report) -> list[str]:
    """How the figures were obtained, and what they leave out: one sentence each."""
    notes = ["1 MAC is one multiply-add of a convolution, linear layer or matrix product, in one forward pass."]
    accuracy = report.after.accuracy or report.before.accuracy
    if accuracy and accuracy.top1_low is not None:
        notes.append(f"Accuracy on {accuracy.n:,} samples; the range is the 95 % Wilson interval of top-1.")
    elif report.after.n_eval:
        notes.append(f"Accuracy on {report.after.n_eval:,} samples.")
    timed = report.after.latency or report.before.latency
    if timed:
        notes.append(
            f"Latency: median of {timed.runs} runs and their quartiles, batch {timed.batch}, {timed.device}, "
            f"{timed.threads} thread{'' if timed.threads == 1 else 's'}."
        )
    uncounted = sorted({*report.before.uncounted, *report.after.uncounted})
    if uncounted:
        notes.append(f"Not in the MAC count, for want of a formula: {', '.join(f.clean(name) for name in uncounted)}.")
    return notes


def _amount(label: str, before: int | None, after: int | None, show: Callable[[int], str]) -> Figure | None:
    """Something of which less is better."""
    if before is None and after is None:
        return None
    shown = _value(before, show), _value(after, show)
    if before is None or after is None:
        return Figure(label, *shown)
    share = after / before if before else None
    return Figure(label, *shown, f.change(before, after), None if before == after else after < before, share)


def _latency(before: Measures, after: Measures) -> Figure | None:
    old, new = before.latency_ms, after.latency_ms
    if old is None and new is None:
        return None
    shown = _value(old, f.milliseconds, _quartiles(before)), _value(new, f.milliseconds, _quartiles(after))
    if old is None or new is None:
        return Figure("Latency", *shown)
    change = f.speed(old, new)
    return Figure("Latency", *shown, change, None if change == "same" else new < old, new / old if old else None)


def _other_scores(before: Measures, after: Measures) -> list[Figure]:
    found: list[Figure] = []
    if before.top5 is not None or after.top5 is not None:
        found.append(_score("Top-5", before.top5, after.top5))
    old = before.accuracy.metric if before.accuracy else None
    new = after.accuracy.metric if after.accuracy else None
    if old is not None or new is not None:
        # The user's own score: its unit and which way is better are unknown.
        difference = f"{new - old:+.4g}" if old is not None and new is not None else ""
        found.append(Figure("Metric", _value(old, f.number), _value(new, f.number), difference))
    return found


def _score(label: str, before: float | None, after: float | None, old_spread: str = "", new_spread: str = "") -> Figure:
    shown = _value(before, f.percent, old_spread), _value(after, f.percent, new_spread)
    if before is None or after is None:
        return Figure(label, *shown)
    change = f.points(before, after)
    return Figure(label, *shown, change, None if change == "same" else after > before)


def _value(number: Any, show: Callable[[Any], str], spread: str = "") -> Value:
    return Value() if number is None else Value(show(number), spread)


def _quartiles(measures: Measures) -> str:
    timed = measures.latency
    return f"{timed.low_ms:.3g} to {f.milliseconds(timed.high_ms)}" if timed else ""


def _interval(measures: Measures) -> str:
    accuracy = measures.accuracy
    return f.interval(accuracy.top1_low, accuracy.top1_high) if accuracy else ""


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `fit.lr` -> text, in their order."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found.update(flat(cast(dict[str, Any], value), f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = _plain(value)
    return found


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in cast(list[Any], value)) or "–"
    return f.number(value) if isinstance(value, float) else str(value)
