"""Numbers as people read them: the one place that decides on digits, units and signs."""

from __future__ import annotations

import math


def count(value: int) -> str:
    """`9,610`, then `125.49 M`: exact below ten thousand, else three to five digits and k, M, G or T."""
    if abs(value) < 10_000:
        return f"{value:,}"
    return _scaled(value, ("k", "M", "G", "T"))


def size(value: int) -> str:
    """Bytes in decimal units: `740 B`, `3.42 MB`."""
    return f"{value} B" if abs(value) < 1000 else _scaled(value, ("kB", "MB", "GB", "TB"))


def _scaled(value: int, units: tuple[str, ...]) -> str:
    power = min(len(units), max(1, (len(str(abs(value))) - 1) // 3))
    scaled = value / 1000**power
    return f"{scaled:.{2 if power > 1 else 1}f} {units[power - 1]}"


def milliseconds(value: float) -> str:
    """Three digits that count: `0.412 ms`, `8.31 ms`, `123 ms`."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g} ms"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f} ms"


def tick(value: float) -> str:
    """A label of an axis of counts: `0`, `250 k`, `1.5 M`."""
    power = 0 if value < 1000 else min(4, int(math.log10(value) + 1e-9) // 3)
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T')[power]}".rstrip()


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(fraction: float) -> str:
    """A share with two decimals: `93.39 %`."""
    return f"{100 * fraction:.2f} %"


def share(fraction: float | None) -> str:
    """A share with one decimal, or nothing where it isn't known: `12.3 %`."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """`92.88 to 93.86 %`, or nothing where the interval isn't known."""
    return "" if low is None or high is None else f"{100 * low:.2f} to {100 * high:.2f} %"


def change(before: float, after: float) -> str:
    """`-50.4 %`; `same` for equal values, nothing where there is nothing to relate to."""
    if before == after:
        return "same"
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def points(before: float, after: float) -> str:
    """The difference of two shares in percentage points: `-0.48 points`."""
    difference = round(100 * (after - before), 2)
    return f"{difference:+.2f} points" if difference else "same"


def speed(before: float, after: float) -> str:
    """`1.93x faster`, `1.10x slower`, or `same`, from two times."""
    if before <= 0 or after <= 0:
        return ""
    ratio = before / after
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return "same"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def number(value: float) -> str:
    """Any figure from a log, with at most four digits that count."""
    return f"{value:.4g}"


def clean(text: str) -> str:
    """The text without what could steer a terminal or a page: one line, no control characters."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
