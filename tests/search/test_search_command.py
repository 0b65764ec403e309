"""`tersenet search`, and the page of the documents."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import tersenet as tn
from run_support import called
from tersenet import api_search
from tersenet.cli.progress import Status
from tersenet.cli.search import Progress
from tersenet.models.open import Source
from test_documents import ROOT, blocks

COMMAND = (
    "search", "resnet8", "--data", "digits", "--target", "macs=50%", "--episodes", "4", "--samples", "40",
    "--images", "32", "--device", "cpu",
)  # fmt: skip


def test_table_recipe_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called(capsys, *COMMAND)
    assert code == 0, err
    recipe = Path("runs") / "search-resnet8" / "recipe.yaml"
    assert out.rstrip().endswith(str(recipe))
    assert "top-1, 40 validation images" in out
    assert "best, episode " in out
    assert "the weights of resnet8 are random" in err
    lines = err.splitlines()
    assert lines[0] == "8 layers, 4 episodes"
    assert lines[1].startswith("1/4  measured  ")
    assert lines[4].startswith("4/4  searched  ")
    code, out, err = called(capsys, *COMMAND, "--json")
    assert err.startswith("8 layers, 4 episodes, 4 known\n")
    document = json.loads(out)
    assert document["baseline"]["n"] == 40
    assert yaml.safe_load(recipe.read_text())["steps"][0]["rates"] == document["rates"]
    dry = tn.compress("resnet8", recipe, data="digits", dry_run=True).report
    assert dry.after.macs == document["episodes"][document["best"]]["macs"] <= document["macs"] // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "flops=50%"), "error: target 'flops=50%' is not understood"),
        (("--target", "macs=1%"), "error: a budget of "),
        (("--prune", "l3"), "error: unknown pruning method 'l3'"),
        (("--reward", "joy"), "error: unknown reward 'joy'"),
        (("--include", "layer9*"), "error: unknown layer 'layer9*'"),
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


@pytest.mark.parametrize("live", [False, True])
def test_what_nothing_can_be_said_of_keeps_its_line(monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: live)
    progress = Progress(Status(stream))
    told = {"event": "episode", "of": 100, "eta_seconds": None, "kind": "searched", "problem": None}
    progress(told | {"done": 6, "value": None, "best": None, "problem": "the mean loss is nan"})
    progress(told | {"done": 7, "value": 0.5, "best": 0.5})
    progress(told | {"done": 8, "value": None, "best": 0.5, "problem": "the mean loss is nan"})
    assert "6/100  searched  the mean loss is nan\n" in stream.getvalue()
    assert "8/100  searched  the mean loss is nan  best 0.5\n" in stream.getvalue()
    assert "0.5  best 0.5\n" not in stream.getvalue()


def test_an_interruption_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = api_search.search_rates

    def interrupted(*arguments: Any, on_event: Any, **more: Any) -> Any:
        def listen(event: dict[str, Any]) -> None:
            on_event(event)
            if event["done"] == 2:
                raise KeyboardInterrupt

        return real(*arguments, on_event=listen, **more)

    monkeypatch.setattr(api_search, "search_rates", interrupted)
    code, out, err = called(capsys, *COMMAND, "--out", str(tmp_path))
    assert (code, out) == (130, "")
    assert "interrupted; the same command goes on after 2 of 4 episodes" in err


def test_the_block_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tn.save(Source("resnet8", arguments=(("width", 4),)).open((1, 8, 8), 10), tmp_path / "runs" / "demo" / "model")
    (block,) = blocks((ROOT / "docs" / "methods" / "amc.md").read_text())
    names: dict[str, Any] = {}
    exec(block.replace("episodes=40", "episodes=3, samples=40, images=32"), names)
    assert names["small"].report.after.macs == names["found"].chosen.macs
