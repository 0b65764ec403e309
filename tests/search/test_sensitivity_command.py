"""`tersenet sensitivity`, and the page of the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tersenet as tn
from run_support import called
from tersenet import api_search
from test_documents import ROOT, blocks

COMMAND = ("sensitivity", "resnet8", "--data", "digits", "--rates", "0.5", "--samples", "40", "--device", "cpu")


def test_table_page_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called(capsys, *COMMAND)
    assert code == 0, err
    page = Path("runs") / "sensitivity-resnet8" / "sensitivity.html"
    assert out.rstrip().endswith(str(page))
    assert "of 40 validation images" in out
    assert "Left out: linear: the network's output" in out
    assert "the weights of resnet8 are random" in err
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "tersenet sensitivity resnet8 --data digits --rates 0.5" in text
    lines = err.splitlines()
    assert lines[0].startswith("8 layers x 1 rates on 40 images  ETA 0:0")
    assert lines[1].startswith("1/8  conv1  rate 0.5  top-1 ")
    code, out, err = called(capsys, *COMMAND, "--json")
    assert err.startswith("8 layers x 1 rates on 40 images, 8 points known\n")
    document = json.loads(out)
    assert document["baseline"]["n"] == 40
    assert set(document["rates"]) == {layer["producers"][0] for layer in document["layers"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rates", "1.0"), "error: rates (=1.0): a rate is the share of channels removed"),
        (("--rates", "0.1;0.2"), "error: --rates 0.1;0.2 must be numbers with commas"),
        (("--include", "layer9*"), "error: unknown layer 'layer9*'"),
        (("--importance", "l3"), "error: unknown importance 'l3'"),
        (("--data", "digit"), "error: unknown data set 'digit'"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = called(capsys, *COMMAND, *arguments, "--out", str(tmp_path / "s"))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(message)
    assert not (tmp_path / "s").exists()


def test_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "sensitivity", "resnet8")
    assert (code, out) == (2, "")
    assert "Missing option '--data'" in err


def test_an_interruption_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = api_search.sensitivity

    def interrupted(*arguments: Any, on_event: Any, **more: Any) -> Any:
        def listen(event: dict[str, Any]) -> None:
            on_event(event)
            if event["done"] == 3:
                raise KeyboardInterrupt

        return real(*arguments, on_event=listen, **more)

    monkeypatch.setattr(api_search, "sensitivity", interrupted)
    code, out, err = called(capsys, *COMMAND, "--out", str(tmp_path))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; the same command goes on after 3 of 8 points"
    monkeypatch.setattr(api_search, "sensitivity", real)
    assert ", 3 points known" in called(capsys, *COMMAND, "--out", str(tmp_path))[2]


def test_python_blocks_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"steps.0.fit.epochs": 2, "steps.1.fit.epochs": 1, "model_arguments.width": 8, "steps.1.multiple": 1}
    short["data.train_limit"] = 256
    tn.compress(None, "sfp_digits", out="runs/demo", overrides=short, device="cpu")
    names: dict[str, Any] = {}
    found = blocks((ROOT / "docs" / "sensitivity.md").read_text())
    assert len(found) == 1
    for block in found:
        exec(block, names)
    small, before = names["small"].report.after, names["small"].report.before
    removed = 0
    for layer in names["found"].layers:
        removed += sum(point.removed for point in layer.points if point.rate == names["rates"][layer.producers[0]])
    assert (small.macs < before.macs) == (removed > 0)
