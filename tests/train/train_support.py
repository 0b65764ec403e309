"""Tiny networks and data for the tests of training."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.data.bundle import Data
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit
from tersenet.train.settings import Fit

SHAPE = (2, 6, 6)
CLASSES = 7


class Batches:
    """A loader of seeded noise with a class-dependent mean; the order depends on the epoch alone."""

    def __init__(
        self,
        n: int,
        batch: int,
        seed: int,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        learnable: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, CLASSES, (n,), generator=generator)
        self.x = torch.randn(n, *SHAPE, generator=generator)
        if learnable:
            pattern = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
            self.x += pattern[self.y]
        self.n, self.batch, self.shuffle, self.rank, self.world = n, batch, shuffle, rank, world

    def _share(self, epoch: int) -> Tensor:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(epoch)) if self.shuffle else None
        return (torch.arange(self.n) if order is None else order)[self.rank :: self.world]

    def __len__(self) -> int:
        return -(-len(self._share(0)) // self.batch)

    def batches(self, epoch: int) -> Any:
        for index in self._share(epoch).split(self.batch):
            yield self.x[index], self.y[index]


def data(n: int = 96, batch: int = 16, *, rank: int = 0, world: int = 1, **more: Any) -> Data:
    share = {"rank": rank, "world": world}
    parts: dict[str, Any] = {
        "train": Batches(n, batch // world, 1, **share),
        "validation": Batches(45, 20, 2, shuffle=False, **share),
        "test": None,
    }
    return Data(name="noise", classes=CLASSES, shape=SHAPE, normalise=((0.0,) * 2, (1.0,) * 2), **(parts | more))


def network(seed: int = 0) -> nn.Module:
    """Convolution, batch norm, dropout: weights, buffers and random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8 * 16, CLASSES),
        )


def train(model: nn.Module, settings: Fit | None = None, **arguments: Any) -> list[dict[str, Any]]:
    """`fit` with what most tests don't care about filled in."""
    usual: dict[str, Any] = {
        "seed": 3,
        "device": "cpu",
        "hooks": Hooks(),
        "checkpoint": None,
        "log": lambda row: None,  # pyright: ignore
    }
    return fit(model, arguments.pop("data", None) or data(), settings or settings_of(), **(usual | arguments))


def settings_of(**changes: Any) -> Fit:
    return Fit(**({"epochs": 3, "lr": 0.05, "weight_decay": 0.0} | changes))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Bit-equal state."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(Hooks):
    """Notes every call, keeps a count over a resume, and pulls weights a little in every place that may change them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps = 0

    def before_training(self, state: Any) -> None:
        self.calls.append("before_training")
        with torch.no_grad():
            state.model[0].weight[0] = 0

    def penalty(self, state: Any) -> Tensor:
        self.calls.append("penalty")
        return 1e-3 * state.model[0].weight.abs().sum()

    def before_step(self, state: Any) -> None:
        self.calls.append("before_step")
        state.model[0].weight.grad[1] = 0

    def after_step(self, state: Any) -> None:
        self.calls.append("after_step")
        self.steps += 1

    def after_epoch(self, state: Any) -> dict[str, Any]:
        self.calls.append("after_epoch")
        with torch.no_grad():
            state.model[0].weight[self.steps % 8] *= 0.5
        return {"steps": self.steps, "norm": state.model[0].weight.norm()}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.steps = saved["steps"]


def everything(**changes: Any) -> Fit:
    """Settings that use all state there is."""
    return settings_of(
        epochs=changes.pop("epochs", 6),
        schedule="cosine",
        warmup_epochs=0.5,
        weight_decay=1e-3,
        label_smoothing=0.1,
        ema=0.9,
        distill={"weight": 0.3, "temperature": 2.0},
        clip_grad=5.0,
        keep="best",
        **changes,
    )


def digest(model: nn.Module) -> str:
    """Equal for bit-equal states."""
    whole = hashlib.sha256()
    for tensor in model.state_dict().values():
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def plain_network() -> nn.Module:
    """Nothing that depends on how samples are shared out: no batch norm, no dropout."""
    model = network()
    model[1], model[6] = nn.Identity(), nn.Identity()
    return model
