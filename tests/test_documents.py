"""Every command and every Python block in README.md and docs/ is run, every program in examples/ too."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import tersenet as tn
from tersenet.cli.main import main
from tersenet.models.build import build
from zoo_support import needs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[str]:
    """The lines that start with `tersenet` in an indented or fenced block, continuation lines joined."""
    joined = text.replace("\\\n", " ")
    return [re.sub(r"\s+", " ", line) for line in re.findall(r"^(?:\$ | {4})(tersenet .*)$", joined, re.M)]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the documents' files exist: weights, a finished demo run, its smaller settings."""
    folder = tmp_path_factory.mktemp("documents")
    torch.save(build("resnet56").state_dict(), folder / "resnet56-4bfd9763.th")
    short = {"steps.0.fit.epochs": 1, "steps.1.fit.epochs": 1, "model_arguments.width": 4, "steps.1.multiple": 1}
    for name in ("demo", "r56"):
        tn.compress(None, "sfp_digits", out=folder / "runs" / name, overrides=short)
    return folder


def test_there_are_commands_and_blocks() -> None:
    assert len(COMMANDS) >= 6
    assert len(blocks(PAGES[0].read_text())) == 2


def with_extras(command: str) -> Any:
    """Commands that need an extra skip where it is not installed."""
    extras = {"timm:": ("timm", "torchvision"), "torchvision:": ("torchvision",), ".onnx": ("onnxscript",)}
    packages = next((packages for text, packages in extras.items() if text in command), ())
    return pytest.param(command, marks=[needs(*packages)])


@pytest.mark.parametrize("command", [with_extras(command) for command in COMMANDS])
def test_command(
    command: str, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("resnet56-4bfd9763.th", "runs"):
        (tmp_path / name).symlink_to(scene / name)
    (tmp_path / "mine.yaml").write_text("steps: [{method: train, fit: {epochs: 1}}]\n")
    words = shlex.split(command)[1:]
    if words[0] == "compress" and "--dry-run" not in words:
        words = [*words, "--dry-run"]  # the recipe, the model and the plan are real; only the training is left out
    if words[:2] == ["recipe", "copy"]:
        words = [*words, "--force"]
    if words[0] != "compress":  # a dry run reads no data
        words = [re.sub(r"^cifar10:DIR$", "digits", word) for word in words]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0, capsys.readouterr().err


def test_python_blocks(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scene)
    load, own = blocks(PAGES[0].read_text())
    exec(load, {})

    x, y = torch.rand(32, 3, 8, 8), torch.randint(0, 2, (32,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    Path("mine.yaml").write_text("steps: [{method: soft_filter_pruning, fit: {epochs: 1}}]\n")
    names: dict[str, Any] = {
        "tn": tn,
        "Net": lambda: torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 4, 3),
            torch.nn.Flatten(),
            torch.nn.Linear(64, 2),
        ),
        "train_loader": loader,
        "test_loader": loader,
        "example": torch.rand(2, 3, 8, 8),
    }
    exec(own, names)
    assert Path("small.pt2").stat().st_size > 0
    assert names["result"].report.after.macs <= names["result"].report.before.macs // 2


@pytest.mark.slow
@needs("torchvision")
def test_python_blocks_of_the_models_page() -> None:
    detector, own, without_data = blocks((ROOT / "docs" / "models.md").read_text())
    names: dict[str, Any] = {}
    exec(detector, names)
    assert names["graph"].macs() > 0
    for block in (own, without_data):
        exec(block, names)
        report = names["result"].report
        assert report.after.macs <= report.before.macs // 2


def example(program: Path) -> Any:
    return pytest.param(program, id=program.stem, marks=[pytest.mark.slow] if program.stem == "yolo_like" else [])


@pytest.mark.parametrize("program", [example(path) for path in sorted((ROOT / "examples").glob("*.py"))])
def test_example(program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = runpy.run_path(str(program))
    module["main"](epochs=1)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
