"""Learned groups as pictures: each layer's kernel norms in the order of its channels, and its groups around them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tersenet.report import format as f
from tersenet.report.parts import text
from tersenet.results import GroupMap

_PIXELS = 96


def group_maps(maps: Sequence[GroupMap]) -> str:
    """One row per layer, one picture per time of training; nothing without maps."""
    if not maps:
        return ""
    epochs = sorted({shown.epoch for shown in maps})
    layers: dict[str, dict[int, GroupMap]] = {}
    for shown in maps:
        layers.setdefault(shown.name, {})[shown.epoch] = shown
    heads = "".join(f"<th>{'before' if epoch == 0 else f'after {epoch}'}</th>" for epoch in epochs)
    rows = "".join(_row(text(name), [at.get(epoch) for epoch in epochs]) for name, at in layers.items())
    return (
        "<details><summary>Kernel norms in the order of the channels, with the groups, and the share of the norm that "
        f'lies in them</summary><div class="wide maps"><table><thead><tr><th>Epochs</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _row(name: str, at: Sequence[GroupMap | None]) -> str:
    return f'<tr><td class="name" title="{name}">{name}</td>{"".join(map(_cell, at))}</tr>'


def _cell(shown: GroupMap | None) -> str:
    if shown is None:
        return "<td></td>"
    groups = "1 group" if shown.groups == 1 else f"{shown.groups} groups"
    return f'<td>{_picture(shown)}<span class="was">{groups}, {f.share(shown.kept)}</span></td>'


def _picture(shown: GroupMap) -> str:
    """One path for each digit, which is its opacity; runs of one digit are one stroke. Then the groups' frames."""
    height, width = len(shown.cells), max(map(len, shown.cells))
    strokes: dict[str, list[str]] = {}
    for y, row in enumerate(shown.cells):
        x = 0
        for digit, run in groupby(row):
            length = len(list(run))
            if digit != "0":
                strokes.setdefault(digit, []).append(f"M{x} {y}.5h{length}")
            x += length
    paths = "".join(
        f'<path stroke-opacity="{int(digit, 16) / 15:.2g}" d="{"".join(strokes[digit])}"/>' for digit in sorted(strokes)
    )
    w, h = width / shown.groups, height / shown.groups
    frames = "".join(f"M{i * w:.4g} {i * h:.4g}h{w:.4g}v{h:.4g}h{-w:.4g}z" for i in range(shown.groups))
    scale = _PIXELS / max(width, height)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width * scale:.0f}" height="{height * scale:.0f}" role="img" '
        f'fill="none"><g stroke="var(--after)">{paths}</g>'
        f'<path stroke="var(--s2)" stroke-width="1.5" vector-effect="non-scaling-stroke" d="{frames}"/></svg>'
    )
