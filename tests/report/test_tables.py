from __future__ import annotations

import pytest
from fake_report import conv, measures, resnet56_report, small_report

from tersenet.report.summary import figures, flat, footnotes, headline, target_met
from tersenet.report.tables import render_text
from tersenet.results import Accuracy, Equality, LayerFit, StepResult


def line(text: str, start: str) -> list[str]:
    """The words of the one line that starts so."""
    found = [one for one in text.splitlines() if one.startswith(start)]
    assert len(found) == 1, (start, text)
    return found[0].split("  ")


def words(text: str, start: str) -> list[str]:
    return [word.strip() for word in line(text, start) if word.strip()]


@pytest.mark.parametrize("width", [80, 100])
def test_figures_before_after_and_change(width: int) -> None:
    text = render_text(resnet56_report(), width)
    assert words(text, "MACs  ") == ["MACs", "125.49 M", "66.18 M", "-47.3 %"]
    assert words(text, "Parameters") == ["Parameters", "853.0 k", "431.5 k", "-49.4 %"]
    assert words(text, "Latency  ") == ["Latency", "21.4 ms", "12.6 ms", "1.70x faster"]
    assert words(text, "Top-1") == ["Top-1", "93.39 %", "92.87 %", "-0.52 points"]
    assert "92.89 to 93.86 %" in text
    assert "Accuracy on 10,000 samples" in text
    assert "batch 1, cpu, 2 threads" in text
    assert "Target macs=50%: missed." in text
    assert "agree on 256 samples" in text
    assert "came back at least once" in text


@pytest.mark.parametrize("width", [80, 100])
def test_layers_fit_and_align(width: int) -> None:
    text = render_text(resnet56_report(), width)
    assert words(text, "layer1.1.conv2") == [
        "layer1.1.conv2", "conv 3x3", "16 -> 10", "16 -> 10", "2.36 M", "921.6 k", "-60.9 %",
    ]  # fmt: skip
    assert words(text, "linear") == ["linear", "linear", "64", "10", "640", "640", "same"]
    assert "…" not in text
    rows = [one for one in text.splitlines() if one.startswith("layer")]
    assert len(rows) == 55  # the heading and 54 layers
    assert len({len(one) for one in rows}) == 1
    assert all(len(one) <= width for one in text.splitlines())


def test_nothing_measured() -> None:
    text = render_text(small_report())
    assert words(text, "Top-1") == ["Top-1", "not measured", "not measured"]
    assert "Latency" not in text
    assert "Target" not in text


def test_measured_on_one_side_only() -> None:
    report = small_report(after=measures(1_729, 98_712, correct=90, n=100, ms=0.5))
    text = render_text(report)
    assert words(text, "Top-1") == ["Top-1", "not measured", "90.00 %"]
    assert words(text, "Latency  ") == ["Latency", "not measured", "0.500 ms"]
    assert headline(report) == "67.6 % fewer MACs, 66.0 % fewer parameters"


FITS = [
    LayerFit(name="conv[1]", before=64, after=40, unfitted=0.5, error=0.256, output_error=0.125),
    LayerFit(name="<b>fc", what="rank", before=32, after=8),
]


@pytest.mark.parametrize("width", [80, 100])
def test_fitted_layers_have_a_table(width: int) -> None:
    step = small_report().steps[0]
    text = render_text(small_report(steps=[step.model_copy(update={"fits": FITS})]), width)
    assert words(text, "conv[1]") == ["conv[1]", "inputs", "64 -> 40", "50.0 %", "25.6 %", "12.5 %"]
    assert words(text, "<b>fc") == ["<b>fc", "rank", "32 -> 8"]
    assert all(len(one) <= width for one in text.splitlines())
    assert "fitted" not in render_text(small_report(), width)


def test_no_layers_and_no_steps() -> None:
    assert "MACs" in render_text(small_report(layers=[], steps=[]))


def test_names_from_strangers_are_plain_text() -> None:
    hostile = conv("[red]x[/nope]\x1b[2J", 8, (1, 2), (1, 1))
    text = render_text(small_report(layers=[hostile], model="[bold]m[/]", notes=["[link=http://x]n"]))
    assert "[red]x[/nope]" in text
    assert "[bold]m[/]" in text
    assert "Note: [link=http://x]n" in text
    assert "\x1b" not in text


def test_only_long_names_give_way() -> None:
    text = render_text(small_report(layers=[conv("block." * 80 + "conv", 8, (10, 20), (10, 10))]), 80)
    assert words(text, "block")[1:] == ["conv 3x3", "10", "20 -> 10", "115.2 k", "57.6 k", "-50.0 %"]
    assert all(len(one) <= 80 for one in text.splitlines())


def test_a_failed_check_is_loud() -> None:
    check = Equality(max_abs=0.2, relative=0.1, tolerance=1e-5, samples=8)
    step = StepResult(index=1, method="m", settings={}, seconds=1, after=measures(1, 1), equality=check)
    assert "compact and masked network DIFFER on 8 samples" in render_text(small_report(steps=[step]), 200)


@pytest.mark.parametrize(
    ("target", "met"),
    [("macs=33%", True), ("macs=32%", False), ("params=2k", True), (None, None), ("latency=8ms", None)],
)
def test_target(target: str | None, met: bool | None) -> None:
    assert target_met(small_report(target=target)) is met


def test_headline() -> None:
    assert headline(resnet56_report()) == (
        "47.3 % fewer MACs, 49.4 % fewer parameters, 1.70x faster, top-1 -0.52 points"
    )
    same = measures(5, 5)
    assert headline(small_report(before=same, after=same)) == ""
    assert headline(small_report(before=same, after=measures(6, 5))) == "20.0 % more parameters"


def test_zero_before() -> None:
    first = figures(small_report(before=measures(0, 0), after=measures(3, 4)))[0]
    assert (first.change, first.share, first.good) == ("", None, False)


def test_metric_and_top5() -> None:
    def scored(metric: float) -> object:
        accuracy = Accuracy(n=10, metric=metric)
        return measures(1, 1).model_copy(update={"accuracy": accuracy, "top5": metric / 2})

    text = render_text(small_report(before=scored(0.75), after=scored(0.5)))
    assert words(text, "Metric") == ["Metric", "0.75", "0.5", "-0.25"]
    assert words(text, "Top-5") == ["Top-5", "37.50 %", "25.00 %", "-12.50 points"]


def test_uncounted_operators_are_said() -> None:
    after = measures(1, 1).model_copy(update={"uncounted": ["aten._trilinear"]})
    assert footnotes(small_report(after=after))[-1] == "Not in the MAC count, for want of a formula: aten._trilinear."


def test_flat_settings() -> None:
    nested = {"a": {"b": 1e-4, "c": {"d": None}}, "e": [1, True], "f": (), "g": {}, "h": False}
    assert flat(nested) == {"a.b": "0.0001", "a.c.d": "–", "e": "1, yes", "f": "–", "g": "{}", "h": "no"}
