"""The rates that follow from curves, and how curves are shown."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersenet.errors import TersenetError
from tersenet.results import Accuracy
from tersenet.search.page import render
from tersenet.search.result import LayerCurve, Point, Sensitivity
from tersenet.search.tables import render_text

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;$\\frac{1}$\x00\x1b[31m"


def accuracy(correct: int, n: int = 1000, **more: Any) -> Accuracy:
    return Accuracy(n=n, correct=correct, top1=correct / n, top1_low=0.9, top1_high=0.94, loss=1.0, **more)


def curve(name: str, correct: list[int], producers: list[str] | None = None) -> LayerCurve:
    rates = [round(0.1 * (at + 1), 1) for at in range(len(correct))]
    points = [Point(rate=r, removed=1, macs=10, accuracy=accuracy(c)) for r, c in zip(rates, correct, strict=True)]
    return LayerCurve(name=name, producers=producers or [name], channels=10, macs_share=0.25, points=points)


def result(*layers: LayerCurve, **more: Any) -> Sensitivity:
    values: dict[str, Any] = {
        "tersenet": "0", "model": "net", "data": "digits", "split": "validation", "settings": {"rates": [0.1]},
        "macs": 100, "baseline": accuracy(920), "layers": list(layers), "skipped": {}, "environment": {},
    }  # fmt: skip
    return Sensitivity(**(values | more))


def test_rates_by_hand() -> None:
    found = result(
        curve("good", [930, 920, 915, 910]),
        curve("edge", [910, 909, 920, 920]),
        curve("bad", [900, 920, 920, 920]),
    )
    # 0.92 - 0.91 is a little more than 0.01 in floating point; what comes behind a bad rate does not count.
    assert found.rates() == {"good": 0.4, "edge": 0.1, "bad": 0.0}
    assert found.rates(max_drop=0.005) == {"good": 0.3, "edge": 0.0, "bad": 0.0}
    assert found.rates(max_drop=0) == {"good": 0.2, "edge": 0.0, "bad": 0.0}


def test_layers_that_are_tied_get_what_the_weakest_bears() -> None:
    found = result(
        curve("a", [920, 800], ["a", "b"]), curve("a#2", [920, 920], ["a"]), curve("b", [800, 800], ["b", "a"])
    )
    assert found.rates() == {"a": 0.0, "b": 0.0}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.floats(0, 1))
def test_no_rate_up_to_the_chosen_one_loses_more(correct: list[int], max_drop: float) -> None:
    layer = curve("a", correct)
    found = result(layer)
    rate = found.rates(max_drop)["a"]
    ahead = [point for point in layer.points if point.rate <= rate]
    assert all(found.drop(point) <= max_drop + 1e-9 for point in ahead)
    if len(ahead) < len(layer.points):
        assert found.drop(layer.points[len(ahead)]) > max_drop
    assert rate == (ahead[-1].rate if ahead else 0.0)


@pytest.mark.parametrize("max_drop", [-0.01, float("nan")])
def test_a_drop_that_is_none(max_drop: float) -> None:
    with pytest.raises(TersenetError, match="must be at least 0"):
        result(curve("a", [920])).rates(max_drop)


def test_table() -> None:
    found = result(curve("layer1.conv", [926, 919, 880]), notes=["a note"], skipped={"the network's output": ["head"]})
    text = render_text(found)
    assert re.search(r"layer1\.conv +10 +25\.0 % +\+0\.6 +-0\.1 +-4\.0 +20 %", text)
    assert "Top-1 92.00 % (920 of 1000 validation images), 95 % interval 90.00 to 94.00 %" in text
    assert "Note: a note" in text
    assert "Left out: head: the network's output" in text


def test_a_table_of_many_rates_fits() -> None:
    text = render_text(result(curve("layer1.conv", list(range(900, 960)))), width=100)
    heads = next(line for line in text.splitlines() if line.startswith("layer"))
    assert "…" not in text
    assert heads.split("MACs")[1].split("1 point")[0].split(" %")[-2].strip() == "600"
    assert max(map(len, text.splitlines())) <= 100


def test_page() -> None:
    found = result(curve("layer1.conv", [926, 919, 880]), curve("layer2.conv", [900, 800, 700]), command="tersenet x")
    page = render(found)
    assert page == render(found)
    assert page.count("<svg ") == 2
    shown = re.sub(r"<[^>]+>", " ", page)
    assert "layer2.conv costs −12.0 points of top-1, and layer1.conv costs −0.1 points of top-1" in shown
    assert "layer1.conv: 0.2" in shown
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", page)
    assert "default-src 'none'" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    assert "#0101" not in page


def test_text_from_strangers_stays_text() -> None:
    texts = dict.fromkeys(("tersenet", "model", "data", "split", "command"), HOSTILE)
    found = result(
        curve(HOSTILE, [900]), **texts, notes=[HOSTILE], skipped={HOSTILE: [HOSTILE]}, settings={HOSTILE: HOSTILE}
    )
    page = render(found)
    assert "<script" not in page
    assert "<img" not in page
    assert "\x00" not in page
    assert "\x1b" not in page + render_text(found)


@pytest.mark.parametrize("score", ["loss", "metric"])
def test_without_top1(score: str) -> None:
    def of(value: float) -> Accuracy:
        return Accuracy(n=10, **({"loss": value} | ({"metric": value} if score == "metric" else {})))

    layer = curve("a", [0])
    layer.points[0].accuracy = of(1.5)
    found = result(layer, baseline=of(1.0))
    lost = 0.5 if score == "loss" else -0.5
    assert found.drop(layer.points[0]) == lost
    assert found.rates(0.1) == {"a": 0.0 if score == "loss" else 0.1}
    assert "+0.5" in render_text(found)
    assert f"{score.capitalize()} 1 over 10 validation samples" in render_text(found)
    assert "1 point" not in render(found) + render_text(found)
