"""The smallest whole run, and processes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.cli.main import main

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": "resnet8",
    "model_arguments": {"width": 4, "in_channels": 1},
    "data": {"source": "digits", "batch_size": 32, "train_limit": 128},
    "target": "macs=60%",
    "steps": [
        {"method": "train", "fit": {"epochs": 3, "lr": 0.05}},
        {"method": "soft_filter_pruning", "fit": {"epochs": 3, "lr": 0.05, "distill": {}, "ema": 0.9}},
    ],
}


def arguments(folder: Path) -> list[str]:
    """The command line of that run; its recipe lies beside the folder."""
    recipe = folder.with_suffix(".yaml")
    # JSON is YAML.
    recipe.write_text(json.dumps(SETTINGS))
    return ["compress", "--recipe", str(recipe), "--device", "cpu", "--out", str(folder)]


def start(*command: str, **more: Any) -> subprocess.Popen[str]:
    """A Python process with one thread, stdout and stderr as pipes.

    What a shell starts in the background ignores Ctrl-C, and so would its children: a test of that asks for it back.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([sys.executable, *command], env=environment, **(pipes | more))


def files(folder: Path) -> dict[str, bytes]:
    """Every file in `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command prints with --json; it has to succeed."""
    code, out, err = called(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, *capsys.readouterr()


class CtrlC:
    """A listener that raises it at the event of this number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, event: dict[str, Any]) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def same(a: nn.Module, b: nn.Module) -> bool:
    """Bit-equal state."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Net(nn.Module):
    """A user's own residual network, with a head that shares the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.b = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.twin = nn.Linear(8, 10)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x))).relu().mean((2, 3))
        return self.head(x) + self.twin(x)


def make() -> nn.Module:
    """For `run_support:make` on the command line."""
    torch.manual_seed(1)
    return Net()


def loaders() -> dict[str, Any]:
    """For `run_support:loaders`: batches of noise with a class-dependent mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    images = torch.randn(40, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) / 3
    batches = list(zip(images.split(20), labels.split(20), strict=True))
    return {"train": batches, "test": batches, "classes": 10}
