"""matplotlib figures as inline SVG that takes its colours and fonts from the page around it.

matplotlib draws with stand-in colours, which become CSS variables in the SVG: one chart is right in light and dark.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, SOFT, LINE, BEFORE, AFTER = "#010101", "#010102", "#010103", "#010104", "#010105"
SERIES = (AFTER, "#010106", "#010107", "#010108")
_VARIABLES: dict[str, str] = dict(
    zip((INK, SOFT, LINE, BEFORE, *SERIES), ("ink", "soft", "line", "before", "after", "s2", "s3", "s4"), strict=True)
)
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are not formulas, whatever dollars they hold
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.pad": 7,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


def formatter(show: Callable[[float], str]) -> FuncFormatter:
    """Axis labels made by `show`."""

    def label(value: float, _position: object) -> str:
        return show(value)

    return FuncFormatter(label)


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of that many pixels."""
    return Figure(figsize=(width / 72, height / 72))  # SVG units are points, 72 to the inch; here 1 is meant as 1 px


def margins(figure: Figure, left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
    """Margins in pixels as the fractions that matplotlib wants."""
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    return left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height


def to_svg(figure: Figure, key: str, tips: Sequence[str] = ()) -> str:
    """The figure as an `<svg>` element. Its ids start with `key`; what was drawn with gid `tip3` shows `tips[3]`."""
    buffer = io.StringIO()
    plain = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=plain)
    text = buffer.getvalue()
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    body = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")]
    body = re.sub(r"font-family: [^\";]+", "font-family: inherit", body)
    body = re.sub(r"(?<=: )#0101\d\d", lambda found: f"var(--{_VARIABLES[found[0]]})", body)
    body = re.sub(r'\bid="', f'id="{key}-', body).replace("url(#", f"url(#{key}-")
    body = body.replace('xlink:href="#', f'href="#{key}-')
    body = re.sub(rf'<g id="{key}-tip(\d+)">', lambda found: _tip_group(tips[int(found[1])]), body)
    width, height = (math.ceil(float(size)) for size in view.groups()) if view else (0, 0)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{body}</svg>'


def _tip_group(tip: str) -> str:
    return f'<g class="tip"><title>{html.escape(tip)}</title>'
