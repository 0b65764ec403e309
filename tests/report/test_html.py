"""The page: whole, safe with any text, and independent of everything outside it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from fake_report import conv, measures, resnet56_curves, resnet56_report, small_report

from tersenet.report.curves import last_value, panels
from tersenet.report.html import render
from tersenet.results import LayerFit, Report, StepResult

VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Reads a page and notes its elements, ids, references and text; fails on a tag that is never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.references.append((value or "").removeprefix("#"))
            self.references += re.findall(r"url\(#?([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def page() -> str:
    return render(resnet56_report())


def test_figures_are_on_the_page(page: str) -> None:
    text = Page(page).text
    for shown in ("66.18 M", "from 125.49 M", "−47.3 %", "1.70× faster", "92.87 %", "−0.52 points", "125,485,696"):
        assert shown in text
    assert "47.3 % fewer MACs, 49.4 % fewer parameters, 1.70× faster, top-1 −0.52 points." in text
    assert "tersenet compress resnet56 --recipe asfp-resnet56" in text
    assert "missed" in text
    assert "with the zeros still in 92.42 %" in text
    assert all(f"layer{stage}.{block}.conv2" in text for stage in (1, 2, 3) for block in range(9))


def test_every_curve_and_setting_is_there(page: str) -> None:
    text = Page(page).text
    for column in ("val_top1", "train_top1", "val_loss", "train_loss", "lr", "rate", "churn"):
        assert f" {column} " in text
    assert "fit.milestones" in text
    assert "30, 45" in text
    assert "seconds" not in text
    # Two wide charts, and five panels for each of the two steps.
    assert page.count("<svg ") == 12


def test_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "foreignobject"} & set(parsed.tags)
    assert not any(name.startswith("on") or name in ("src", "xlink:href", "action") for name, _ in parsed.attributes)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.references) <= set(parsed.ids)
    assert parsed.references


def test_colours_follow_the_page(page: str) -> None:
    charts = "".join(re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL))
    assert "var(--after)" in charts
    assert "#0101" not in charts
    assert re.findall(r"#[0-9a-f]{6}\b", charts) == []  # any other colour would be wrong in the dark
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    dark = page[page.index("prefers-color-scheme: dark") : page.index("* { box-sizing")]
    assert all(f"--{name}:" in dark for name in used)


def test_the_same_report_gives_the_same_page(page: str) -> None:
    assert render(resnet56_report()) == page


def test_layers_explain_themselves_on_hover(page: str) -> None:
    assert "<title>layer1.1.conv2: 16 → 10 channels, 2.36 M → 921.6 k MACs</title>" in page


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;$\\frac{1}$\x00\x1b"


def hostile_report() -> Report:
    layer = conv(HOSTILE, 8, (1, 4), (1, 2)).model_copy(update={"kind": HOSTILE, "note": HOSTILE})
    after = measures(10, 10).model_copy(update={"uncounted": [HOSTILE]})
    step = StepResult(
        index=1,
        method=HOSTILE,
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        seconds=1,
        after=after,
        curves=[{"epoch": 0, HOSTILE: 1.0}, {"epoch": 1, HOSTILE: 2.0}],
        notes=[HOSTILE],
    )
    texts = dict.fromkeys(("tersenet", "model", "data", "target", "command"), HOSTILE)
    return small_report(
        layers=[layer], steps=[step], after=after, notes=[HOSTILE], recipe={"name": HOSTILE, HOSTILE: [HOSTILE]},
        environment={HOSTILE: HOSTILE}, **texts,
    )  # fmt: skip


def test_text_from_strangers_stays_text() -> None:
    text = render(hostile_report())
    parsed = Page(text)
    assert not {"script", "img"} & set(parsed.tags)
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert len(parsed.ids) == len(set(parsed.ids))


def test_very_long_names() -> None:
    name = "very.long." * 60 + "conv"
    layers = [conv(f"{name}{index}", 8, (1, 4), (1, 2)) for index in range(3)]
    text = render(small_report(layers=layers, model="m" * 500, data="d" * 500))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert max(map(len, labels)) <= 30
    assert "…very.long.conv2" in labels
    assert f"<title>{name}2:" in text


@pytest.mark.parametrize("count", [1, 6, 7, 26, 27, 200])
def test_any_number_of_layers(count: int) -> None:
    layers = [conv(f"features.{index}", 8, (4, 4), (4, 2)) for index in range(count)]
    assert Page(render(small_report(layers=layers))).text.count("conv 3x3") == count


def test_nothing_measured_and_nothing_recorded() -> None:
    text = Page(render(small_report(layers=[], steps=[]))).text
    assert "not measured" in text
    assert "not recorded" in text
    assert "Made from Python" in text
    assert "from not measured" not in text
    assert "Step by step" not in text


def test_accuracy_known_for_some_steps_only() -> None:
    report = resnet56_report()
    report.steps[0].after.top1 = None
    assert "92.87 %" in Page(render(report)).text


def test_before_is_not_repeated_after_a_training_step() -> None:
    report = small_report()
    trained = StepResult(index=0, method="train", settings={}, seconds=1, after=report.before)
    pruned = report.steps[0].model_copy(update={"index": 1})
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", render(small_report(steps=[trained, pruned])))
    assert [label for label in labels if label == "before" or label[:2] in ("1.", "2.")] == [
        "1. train", "2. soft_filter_pruning",
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
def test_short_curves(rows: int) -> None:
    step = small_report().steps[0].model_copy(update={"curves": resnet56_curves(rows)})
    assert render(small_report(steps=[step])).count("<figure>") == 5


def test_panels_group_and_order_columns() -> None:
    rows = [
        {"epoch": 3, "lr": 0.1, "train_loss": 2.0, "val_loss": None, "train_top1": 0.5, "val_top1": None, "tag": "x"},
        {
            "epoch": 4,
            "lr": 0.1,
            "train_loss": float("nan"),
            "val_loss": 1.0,
            "train_top1": 0.6,
            "mask_age": 7,
            "ok": True,
        },
    ]
    found = panels(rows)
    assert [(panel.title, list(panel.lines), panel.percent) for panel in found] == [
        ("Top-1", ["train_top1"], True),
        ("Loss", ["val_loss", "train_loss"], False),
        ("Learning rate", ["lr"], False),
        ("Mask age", ["mask_age"], False),
    ]
    assert found[0].lines["train_top1"] == [(3, 0.5), (4, 0.6)]
    assert last_value(found[1].lines["train_loss"]) == 2.0
    assert found[1].lines["val_loss"][1] == (4, 1.0)
    assert panels([]) == []
    assert [point[0] for point in panels([{"loss": 1.0}, {"loss": 2.0}])[0].lines["loss"]] == [0, 1]


def test_fitted_layers_are_in_the_step_that_fitted_them() -> None:
    step = small_report().steps[0]
    fits = [LayerFit(name="<b>conv", before=64, after=40, unfitted=0.5, error=0.256, output_error=0.125)]
    page = render(small_report(steps=[step.model_copy(update={"fits": fits})]))
    assert "&lt;b&gt;conv" in page
    assert "25.6 %" in page
    assert "12.5 %" in page
    assert "Unfitted" not in render(small_report())
