"""tersenet recipe"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tersenet.recipe import load_recipe
from tersenet.recipe_shipped import shipped

Cli = Callable[..., tuple[int, str, str]]

BAD = "model: resnet20\nseed: -1\nsteps:\n  - {method: trian}\n  - method: train\n    fit: {epochs: 0}\n"


def test_list(cli: Cli) -> None:
    code, out, _ = cli("recipe", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(shipped())
    document = json.loads(cli("recipe", "list", "--json")[1])
    assert [recipe["name"] for recipe in document["recipes"]] == list(shipped())


def test_show_is_the_file_with_its_comments(cli: Cli) -> None:
    assert cli("recipe", "show", "sfp_digits")[1] == shipped()["sfp_digits"].read_text()
    document = json.loads(cli("recipe", "show", "sfp_digits", "--json")[1])
    assert load_recipe(document) == load_recipe("sfp_digits")


def test_copy_never_overwrites(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("recipe", "copy", "sfp_digits")[0] == 0
    copied = tmp_path / "sfp_digits.yaml"
    assert copied.read_text() == shipped()["sfp_digits"].read_text()
    copied.write_text("mine\n")
    code, _, err = cli("recipe", "copy", "sfp_digits")
    assert code == 1
    assert "--force" in err
    assert copied.read_text() == "mine\n"
    assert cli("recipe", "copy", "sfp_digits", "--force")[0] == 0
    assert copied.read_text() != "mine\n"
    assert cli("recipe", "copy", "sfp_digits", "sub/other.yaml")[0] == 0
    assert (tmp_path / "sub" / "other.yaml").is_file()


def test_check(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD)
    code, out, err = cli("recipe", "check", "sfp_digits", str(bad), str(tmp_path / "none.yaml"))
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "sfp_digits: OK"
    assert lines[1].startswith(f"{bad}:2: seed = -1: must be at least 0")
    assert lines[2] == f'{bad}:4: steps[0].method = "trian": unknown method; did you mean train?'
    assert lines[3].startswith(f"{bad}:6: steps[1].fit.epochs = 0: must be at least 1")
    assert "No such file" in lines[4]
    assert len(lines) == 5


def test_check_as_json_and_with_overrides(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD)
    code, out, _ = cli("recipe", "check", str(bad), "--json")
    (result,) = json.loads(out)["files"]
    assert code == 1
    assert (result["file"], result["ok"], len(result["errors"])) == (str(bad), False, 3)
    fixed = ("--set", "seed=1", "--set", "steps.0={method: train, fit: {epochs: 1}}", "--set", "steps.1.fit.epochs=2")
    assert cli("recipe", "check", str(bad), *fixed) == (0, f"{bad}: OK\n", "")


def test_every_shipped_recipe_checks(cli: Cli) -> None:
    assert cli("recipe", "check", *shipped())[0] == 0


def test_schema(cli: Cli) -> None:
    schema = json.loads(cli("recipe", "schema")[1])
    assert "soft_filter_pruning" in schema["properties"]["steps"]["items"]["discriminator"]["mapping"]
