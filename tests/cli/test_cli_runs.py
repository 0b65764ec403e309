"""The commands that run something, each once, on the smallest network and data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tersenet as tn

Cli = Callable[..., tuple[int, str, str]]

CHANGES = ("data.train_limit=64", "steps.0.fit.epochs=1", "steps.1.fit.epochs=1")
BOTH = (*(part for change in CHANGES for part in ("--set", change)), "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that is over; each process of a divided run of the tests has its own."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    tn.compress("resnet8", "sfp_digits", overrides=CHANGES, device="cpu", out=folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_compress_gives_one_json_document_and_a_report(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    code, out, err = cli("compress", "resnet8", "--recipe", "sfp_digits", *BOTH, "--out", str(folder), "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    assert report["after"]["n_eval"] == 359
    assert report["command"].startswith("tersenet ")
    assert "step 2/2 soft_filter_pruning  epoch 1/1" in err
    assert (folder / "report.html").is_file()


def test_the_same_command_again_does_nothing_twice(cli: Cli, folder: Path) -> None:
    code, out, err = cli("compress", "resnet8", "--recipe", "sfp_digits", *BOTH, "--out", str(folder))
    assert code == 0
    assert "MACs" in out
    assert out.rstrip().endswith(str(folder / "report.html"))
    assert "step 2 (soft_filter_pruning) was done before" in err
    assert "epoch" not in err


def test_dry_run_writes_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("compress", "resnet20", "--recipe", "sfp_resnet20_cifar10", "--dry-run")
    assert code == 0
    assert "-39.0 %" in out
    assert list(tmp_path.iterdir()) == []


def test_eval_counts_exactly(cli: Cli, folder: Path) -> None:
    arguments = ("eval", str(folder / "model"), "--data", "digits", "--device", "cpu")
    accuracy = json.loads(cli(*arguments, "--json")[1])
    assert accuracy["n"] == 359
    assert accuracy["top1"] == pytest.approx(accuracy["correct"] / 359)
    code, out, _ = cli(*arguments, "--batch-size", "7")
    assert code == 0
    share = f"{100 * accuracy['top1']:.2f} % ({accuracy['correct']} of 359), 95 % interval "
    assert out.startswith(share)


def test_measure(cli: Cli) -> None:
    found = json.loads(cli("measure", "resnet20", "--layers", "--json")[1])
    # 270k parameters and 40.55M MACs, as in He et al. 2016 and the specification.
    assert (found["params"], found["macs"]) == (269_722, 40_551_040)
    assert sum(layer["macs"] for layer in found["layers"].values()) == found["macs"]
    code, out, _ = cli("measure", "resnet20", "--input", "3x16x16")
    assert code == 0
    assert f"{(40_551_040 - 640) // 4 + 640:,}" in out


def test_measure_the_workload(cli: Cli, tmp_path: Path) -> None:
    pruned = {"steps.1.fit.epochs": 1, "steps.0.fit.epochs": 1, "model_arguments.width": 4}
    tn.compress(None, "sparse_winograd_digits", out=tmp_path / "run", overrides=pruned)
    network = str(tmp_path / "run" / "model")
    found = json.loads(cli("measure", network, "--workload", "--data", "digits", "--samples", "7", "--json")[1])
    counted = found["workload"]
    assert (counted["images"], counted["data"]) == (7, "digits")
    assert counted["totals"]["all"]["dense"] == found["macs"]
    kinds = [row["kind"] for row in counted["rows"]]
    assert (kinds.count("winograd_relu"), kinds.count("native")) == (3, 1)
    for row in counted["rows"]:
        if row["kind"] == "dense":
            assert row["exact"] == row["dense"]
        else:
            assert row["exact"] < row["native"] < row["dense"]
            assert row["weight_density"] == pytest.approx(0.3, abs=0.01)
    code, out, _ = cli("measure", network, "--workload")
    assert code == 0
    assert "images of noise: give --data" in out
    assert "times fewer than dense in the sparse layers" in out
    assert "no layer has a mask" in cli("measure", "resnet8", "--workload", "--samples", "2")[1]
    code, _, err = cli("measure", "resnet8", "--data", "digits")
    assert code == 1
    assert "--data is for --workload" in err


def test_export_serves_any_batch(cli: Cli, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "digits.pt2"
    code, out, _ = cli("export", str(folder / "model"), str(file))
    assert code == 0
    assert str(file) in out
    module = torch.export.load(file).module()
    for batch in (1, 5):
        assert module(torch.randn(batch, 1, 8, 8)).shape == (batch, 10)


def test_report_is_rendered_anew(cli: Cli, folder: Path) -> None:
    (folder / "report.html").unlink()
    code, out, _ = cli("report", str(folder))
    assert code == 0
    assert "MACs" in out
    assert (folder / "report.html").read_text().startswith("<!")


@pytest.mark.parametrize("content", ["{", '{"format": 1}', "[]"])
def test_a_damaged_report(cli: Cli, tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    code, out, err = cli("report", str(tmp_path))
    assert (code, out) == (1, "")
    assert "report.json is damaged or of another version" in err


def test_train(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("train", "resnet8", "--data", "digits", "--epochs", "1", "--lr", "0.05", "--device", "cpu", "--json")
    code, out, err = cli(*arguments, "--set", "data.train_limit=64")
    assert code == 0, err
    report = json.loads(out)
    assert report["recipe"]["steps"][0]["fit"]["lr"] == 0.05
    assert (tmp_path / "runs" / "train-resnet8" / "report.json").is_file()


@pytest.mark.parametrize("command", ["eval", "measure", "export"])
def test_random_weights_are_told(cli: Cli, folder: Path, tmp_path: Path, command: str) -> None:
    more = {"eval": ("--data", "digits", "--device", "cpu"), "measure": (), "export": (str(tmp_path / "x.pt2"),)}
    code, out, err = cli(command, "resnet8", *more[command], "--json")
    assert (code, err) == (0, "note: the weights of resnet8 are random; --weights FILE loads trained ones\n")
    json.loads(out)
    assert cli(command, str(folder / "model"), *more[command])[2] == ""


def test_a_network_for_other_inputs_is_one_line(cli: Cli) -> None:
    code, out, err = cli("eval", "vgg16", "--data", "digits", "--device", "cpu")
    assert (code, out) == (1, "")
    assert err.startswith("error: vgg16 failed on a batch of inputs (250, 1, 8, 8): ")
    assert "choose data of their shape, or another network" in err
    assert err.count("\n") == 1
