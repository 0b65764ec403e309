"""Small pieces of the page. All text that comes from a report passes through `text` or `typeset`."""

from __future__ import annotations

import html
import re

from tersenet.report import format as f
from tersenet.report.style import CSS


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML. Its policy forbids scripts and requests."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def text(value: object) -> str:
    """Any value as harmless text on one line."""
    return html.escape(f.clean(str(value)))


def typeset(figure: str) -> str:
    """Our own figures with a real minus and multiplication sign."""
    signed = re.sub(r"(?<!\w)-(?=\d)", "−", html.escape(figure))
    return re.sub(r"(?<=\d)x (?=faster|slower)", "× ", signed)


def fact_list(facts: list[tuple[str, str]]) -> str:
    """Large figures in a row: (name, HTML)."""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def badge(change: str, good: bool | None) -> str:
    """A verdict in green, red or, for None, grey."""
    kind = {True: "good", False: "bad", None: "even"}[good]
    return f'<span class="badge {kind}">{typeset(change)}</span>' if change else ""


def share_width(share: float) -> str:
    """A share as a CSS width, at most all of it."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def legend(*entries: tuple[str, str, str]) -> str:
    """A legend: (CSS variable, name, value)."""
    shown = (
        f'<span><i style="background:var(--{color})"></i>{text(name)} <b>{text(value)}</b></span>'
        for color, name, value in entries
    )
    return f'<div class="key">{"".join(shown)}</div>'


def note_list(notes: list[str]) -> str:
    """Sentences, one per bullet; nothing for none."""
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<ul class="notes small">{items}</ul>' if items else ""


def pair_list(values: dict[str, str]) -> str:
    """Names and values in two columns; nothing for none."""
    items = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in values.items())
    return f'<dl class="pairs">{items}</dl>' if items else ""
