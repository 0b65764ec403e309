"""tersenet models, and timm's and torchvision's names in the other commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo_support import needs

Cli = Callable[..., tuple[int, str, str]]


def test_a_pattern_chooses(cli: Cli) -> None:
    code, out, _ = cli("models", "resnet56*", "--json")
    document = json.loads(out)
    assert code == 0
    assert {entry["name"] for entry in document["models"]} == {"resnet56", "resnet56_projection"}
    assert {known["model"] for known in document["weights"]} == {"resnet56"}


def test_the_list_says_how_others_are_named(cli: Cli) -> None:
    assert "timm:NAME and torchvision:NAME (pip install 'tersenet[zoo]')" in cli("models")[1]


@needs("timm", "torchvision")
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_names_of_a_library(cli: Cli, package: str) -> None:
    code, out, _ = cli("models", f"{package}:resnet1*")
    assert code == 0
    assert {f"{package}:resnet18", f"{package}:resnet152"} <= set(out.split())
    assert all(name.startswith(f"{package}:resnet1") for name in out.split())


@needs("timm", "torchvision")
@pytest.mark.parametrize(
    "name", ["timm:test_resnet", pytest.param("torchvision:mobilenet_v3_small", marks=pytest.mark.slow)]
)
def test_measure_and_a_dry_run(cli: Cli, name: str) -> None:
    code, out, err = cli("measure", name, "--input", "3x64x64", "--json")
    assert code == 0
    assert json.loads(out)["macs"] > 0
    assert f"the weights of {name} are random" in err
    code, out, _ = cli("compress", name, "--recipe", "sfp_digits", "--dry-run", "--data", "cifar10:DIR", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["model"] == name
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]


@pytest.mark.slow
@needs("timm", "torchvision")
def test_a_whole_run_and_eval(cli: Cli, tmp_path: Path) -> None:
    short = ("--set", "steps.0.fit.epochs=1", "--set", "steps.1.fit.epochs=1")
    code, _, err = cli("compress", "timm:test_resnet", "--recipe", "sfp_digits", "--out", str(tmp_path / "r"), *short)
    assert code == 0, err
    code, out, _ = cli("eval", str(tmp_path / "r"), "--data", "digits", "--json")
    assert code == 0
    kept = json.loads((tmp_path / "r" / "report.json").read_text())["after"]["top1"]
    assert json.loads(out)["top1"] == kept
