"""The settings of AMC, checked before anything is opened, and what it gives back.

Units: rates and shares are fractions in 0..1, MACs are counts for one sample.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.recipe_target import Target
from tersenet.results import Accuracy

FORMAT = 1
EPISODES = 800
SPLITS = ("validation", "train", "test")
Prune = Literal["channel_pruning", "magnitude"]
Reward = Literal["accuracy", "macs", "params"]
Residual = Literal["independent", "coupled"]
Kind = Literal["even", "measured", "searched"]


@dataclass(frozen=True)
class AmcSettings:
    """Everything but model and data that decides the result.

    Args:
        target: the budget of every episode: macs=50%, params=0.3M, latency=60% or latency=4ms (of the convolutions,
            for one image on this machine). None, for the rewards that weigh cost themselves: no budget.
        reward: `accuracy` at the end of an episode (top-1; the user's own metric, or less loss, where there is no
            top-1); `macs` or `params`: less error times the logarithm of that count.
        prune: what prunes the network in each episode, and is to prune it with the rates that are found:
            `channel_pruning` with its least squares, from statistics of the original network, or `magnitude`.
        episodes: in the first eighth of them actions are drawn at random.
        lowest: share of each layer's channels that stays at least.
        multiple: what is left of a layer is a multiple of this.
        images, positions: as for `channel_pruning`.
        samples: images that every episode is evaluated on, at most.
        split: `validation`, `train` or `test`; None: validation images, or training images where there are none.
        include, exclude, residual: as for the method in `prune`.
        seed: of every draw.

    Raises:
        TersenetError: a value out of range, or neither budget nor a reward that weighs cost.
        UnknownNameError: a name that there is not.
    """

    target: str | None = None
    reward: Reward = "accuracy"
    prune: Prune = "channel_pruning"
    episodes: int = EPISODES
    lowest: float = 0.2
    multiple: int = 1
    images: int = 500
    positions: int = 32
    samples: int = 1000
    split: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    residual: Residual = "coupled"
    seed: int = 0

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON gives it back, with lists for tuples."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def warmup(self) -> int:
        """Episodes whose actions are drawn at random."""
        return self.episodes // 8

    @property
    def budget(self) -> Target | None:
        return budget_of(self.target) if self.target is not None else None

    def __post_init__(self) -> None:
        named: dict[str, tuple[str, tuple[str, ...]]] = {
            "reward": (self.reward, get_args(Reward)),
            "pruning method": (self.prune, get_args(Prune)),
            "split": (self.split or SPLITS[0], SPLITS),
            "residual mode": (self.residual, get_args(Residual)),
        }
        for kind, (value, known) in named.items():
            if value not in known:
                raise UnknownNameError(kind, str(value), known, f"Known: {', '.join(known)}.")
        for name in ("episodes", "multiple", "images", "positions", "samples"):
            if getattr(self, name) < 1:
                raise TersenetError(f"{name} (={getattr(self, name)}) must be at least 1")
        if not 0 < self.lowest <= 1:
            raise TersenetError(f"lowest (={self.lowest}) is the share of channels that stays: above 0 and at most 1")
        if self.budget is None and self.reward == "accuracy":
            raise TersenetError(
                "the reward accuracy needs a target (macs=50%): without one it is best to remove nothing. The rewards "
                "macs and params need none"
            )


_LATENCY = re.compile(r"^\s*latency\s*=\s*(\d+(?:\.\d+)?)\s*(%|ms)\s*$")


def budget_of(text: str) -> Target:
    """A target as recipes have it, or one of latency, whose unit is then a microsecond.

    Raises:
        TersenetError: any other form, and nothing or more than everything.
    """
    found = _LATENCY.match(text)
    if found is None:
        return Target.parse(text)
    relative = found[2] == "%"
    value = float(found[1]) * (0.01 if relative else 1000)
    if value <= 0 or (relative and value > 1):
        raise TersenetError(f"target {text!r} must be above 0" + (" and at most 100%" if relative else ""))
    return Target("latency", value, relative)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Episode(_Record):
    """One pruning of the whole network. `counts` are the channels left, in the order of the layers.

    A network whose loss or metric is not finite has no `accuracy`, and a `problem`: it is never the best one.
    """

    kind: Kind
    counts: list[int]
    cost: int = Field(description="in the budget's unit: MACs, parameters or microseconds")
    macs: int
    params: int
    accuracy: Accuracy | None
    reward: float
    problem: str | None = None


class LayerChoice(_Record):
    """One channel group, or what one layer reads of a residual trunk, in the best episode."""

    name: str
    channels: int
    kept: int
    rate: float = Field(description="share of the channels removed")


class AmcResult(_Record):
    """The whole search. `skipped` has the groups that were not searched, by reason."""

    format: int = FORMAT
    tersenet: str
    model: str
    data: str
    split: str
    settings: dict[str, Any]
    macs: int
    params: int
    limit: int | None = Field(description="the budget: MACs, parameters or microseconds")
    baseline: Accuracy
    best: int = Field(description="number of the best episode")
    layers: list[LayerChoice]
    rates: dict[str, float] = Field(description="for the setting `rates` of the method in settings.prune")
    episodes: list[Episode]
    skipped: dict[str, list[str]]
    environment: dict[str, Any]
    command: str | None = None

    @property
    def chosen(self) -> Episode:
        """The best episode."""
        return self.episodes[self.best]

    @property
    def accuracy(self) -> Accuracy:
        """That of the best episode, on the images that it was chosen by."""
        assert self.chosen.accuracy is not None
        return self.chosen.accuracy

    def first(self, kind: Kind) -> Episode | None:
        """The even shares or the measured ones that the search started from, where it had them."""
        return next((episode for episode in self.episodes if episode.kind == kind), None)

    def recipe(self) -> dict[str, Any]:
        """A recipe of one step that prunes with these rates."""
        asked = self.settings
        step = {"method": asked["prune"], "rate": 0.0, "rates": self.rates, "residual": asked["residual"]}
        step |= {"include": asked["include"], "exclude": asked["exclude"]}
        if asked["prune"] == "magnitude":
            step["recalibrate_bn"] = RECALIBRATED
        return {"description": f"Rates that AMC found for {self.model}", "seed": asked["seed"], "steps": [step]}


RECALIBRATED = 4
"""Training batches from which batch norm statistics are estimated anew after pruning by magnitude."""
