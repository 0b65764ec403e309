"""Pictures of learned groups on the page."""

from __future__ import annotations

import re

import pytest
from fake_report import small_report
from pydantic import ValidationError
from test_html import Page

from tersenet.report.group_maps import group_maps
from tersenet.report.html import render
from tersenet.results import GroupMap

CELLS = ["ff00", "f800", "00ff", "001f"]
MAPS = [
    GroupMap(name="layer1.<b>", epoch=0, groups=1, kept=1.0, cells=CELLS),
    GroupMap(name="layer1.<b>", epoch=4, groups=2, kept=0.9375, cells=CELLS),
    GroupMap(name="fc", epoch=4, groups=4, kept=0.5, cells=["0f", "f0"]),
]


def test_maps_are_on_the_page() -> None:
    report = small_report()
    step = report.steps[0].model_copy(update={"maps": MAPS})
    plain = render(report)
    page = render(report.model_copy(update={"steps": [step, *report.steps[1:]]}))
    parsed = Page(page)
    assert page.count("<svg ") == plain.count("<svg ") + 3
    for shown in ("before", "after 4", "2 groups, 93.8 %", "1 group, 100.0 %", "layer1.<b>"):
        assert shown in parsed.text
    assert len(parsed.ids) == len(set(parsed.ids))


def test_a_picture_has_every_cell_and_group() -> None:
    picture = re.findall(r"<svg .*?</svg>", group_maps(MAPS[1:2]))[0]
    strokes = dict(re.findall(r'<path stroke-opacity="([\d.]+)" d="([^"]*)"', picture))
    assert strokes["1"] == "M0 0.5h2M0 1.5h1M2 2.5h2M3 3.5h1"
    assert sorted(strokes) == ["0.067", "0.53", "1"]
    assert 'd="M0 0h2v2h-2zM2 2h2v2h-2z"' in picture
    assert set(re.findall(r"#\w+", picture)) == set(), "colours are the page's"
    assert group_maps([]) == ""


@pytest.mark.parametrize("cells", [["0g"], ['"><script>'], [], ["0" * 17], ["0"] * 17])
def test_forged_cells_are_refused(cells: list[str]) -> None:
    with pytest.raises(ValidationError):
        GroupMap(name="a", epoch=0, groups=1, kept=1.0, cells=cells)
