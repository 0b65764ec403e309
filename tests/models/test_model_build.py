from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.models.build import build, build_custom
from tersenet.models.registry import ENTRIES


@pytest.mark.parametrize("name", ENTRIES)
def test_every_network_builds_on_meta_and_maps_its_input_to_its_classes(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
        x = torch.empty(2, *ENTRIES[name].input_shape)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(x).shape == (2, ENTRIES[name].classes)


@pytest.mark.parametrize("name", ENTRIES)
def test_classes_channels_and_width_may_be_overridden(name: str) -> None:
    with torch.device("meta"):
        model = build(name, classes=7, in_channels=1, width=4)
        x = torch.empty(2, 1, *ENTRIES[name].input_shape[1:])
    assert model(x).shape == (2, 7)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    # The stem of the Winograd-aware paper's ResNet does not scale.
    assert first.weight.shape[:2] == (32 if name == "winograd_resnet18" else 4, 1)


@pytest.mark.parametrize("name", ["resnet8", "resnet8_projection", "preresnet20", "vgg11_bn_cifar"])
def test_exports_with_a_free_batch_size(name: str) -> None:
    model = build(name, width=4).eval()
    x = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("N", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    y = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(y), model(y))


def test_same_seed_same_network() -> None:
    first, second = (torch.random.manual_seed(3) and build("resnet8") for _ in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("classes", 10**9),
        ("classes", 0),
        ("classes", "x"),
        ("classes", True),
        ("classes", None),
        ("in_channels", 0),
        ("in_channels", -3),
        ("width", 1e3),
        ("width", 257),
    ],
)
def test_absurd_arguments_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(TersenetError, match=rf"model 'resnet20': {argument}={value!r} must be an integer from 1 to"):
        build("resnet20", **{argument: value})


def test_unknown_argument_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown argument of model 'resnet20' 'clases'; did you mean 'classes'"):
        build("resnet20", clases=10)
    # What the name stands for can't be overridden.
    with pytest.raises(UnknownNameError, match=r"'depth'.*takes classes, in_channels, width"):
        build("resnet20", depth=56)


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="vgg16_bn"):
        build("vgg16bn")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder that is not on the import path yet; modules of it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


MINE = """
from torch import nn
LIMIT = 3
def make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
def number(): return 4
def broken(): raise ValueError("no weights today")
def needs(depth): return nn.Identity()
"""


def test_custom_function_of_the_current_folder(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    assert isinstance(build_custom("mine:make")[0], nn.Conv2d)


def test_custom_class_in_a_package(folder: Path) -> None:
    (folder / "pack").mkdir()
    (folder / "pack" / "net.py").write_text("from torch import nn\nclass Net(nn.Module): ...\n")
    assert type(build_custom("pack.net:Net")).__name__ == "Net"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine", "form package.module:function"),
        ("mine:", "form package.module:function"),
        (":make", "form package.module:function"),
        ("mine:make:x", "form package.module:function"),
        ("../mine:make", "form package.module:function"),
        ("nowhere:make", "no module 'nowhere', neither installed nor in the current folder"),
        ("mine.inner:make", "no module 'mine.inner'"),
        ("mine:mak", r"has no 'mak'; did you mean 'make'\?"),
        ("mine:LIMIT", "'LIMIT' is a int, not a function"),
        ("mine:number", r"number\(\) must return a torch.nn.Module, not int"),
        ("mine:broken", r"broken\(\) raised ValueError: no weights today"),
        ("mine:needs", r"needs\(\) raised TypeError: .*depth"),
        ("half:make", "importing half raised SyntaxError"),
        ("lacking:make", "importing lacking raised ModuleNotFoundError: No module named 'not_installed'"),
    ],
)
def test_custom_errors_say_what_is_wrong(folder: Path, spec: str, message: str) -> None:
    (folder / "mine.py").write_text(MINE)
    (folder / "half.py").write_text("def make(:\n")
    (folder / "lacking.py").write_text("import not_installed\n")
    with pytest.raises(TersenetError, match=message):
        build_custom(spec)
