"""The public functions that look for rates before anything is pruned. They leave the network as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tersenet.data.load import load_data
from tersenet.environment import device_named
from tersenet.errors import TersenetError
from tersenet.graph.copies import copied
from tersenet.models.open import Source
from tersenet.models.usable import check_usable, unwrapped
from tersenet.pipeline import quiet
from tersenet.search.amc import search
from tersenet.search.amc_settings import EPISODES, AmcResult, AmcSettings, Prune, Reward
from tersenet.search.result import Sensitivity
from tersenet.search.sensitivity import analyse
from tersenet.search.settings import RATES, SAMPLES, Settings


def sensitivity(
    model: str | nn.Module,
    data: Any,
    *,
    rates: Iterable[float] = RATES,
    importance: str = "l1",
    samples: int = SAMPLES,
    split: str | None = None,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    residual: Literal["independent", "coupled"] = "coupled",
    weights: str | Path | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    fresh: bool = False,
    on_event: Callable[[dict[str, Any]], None] = quiet,
    command: str | None = None,
) -> Sensitivity:
    """Accuracy against pruning rate, one layer at a time, on a network that is not changed.

    Args:
        model: as for `compress`; a module is not changed.
        data: as for `compress`.
        rates: shares of a layer's channels that are set to zero, each at least 0 and below 1.
        importance: the score of the method `magnitude` by which the weakest channels are told.
        samples: images of the split that every point is evaluated on, the same ones each time.
        split: `validation`, `train` or `test`. None: validation images, or training images where there are none;
            rates chosen by test images would make the test useless.
        include, exclude: layers, by pattern, as for `magnitude`. `residual` too.
        out: the folder. The same call with the same folder goes on where it stopped. None: nothing is kept.
        fresh: remove what an earlier analysis left in `out`.

    Raises:
        TersenetError: anything in the arguments that can't be used; nothing has been measured then.
    """
    _check("sensitivity", data, {"rates": rates, "include": include, "exclude": exclude})
    settings = Settings(tuple(rates), importance, samples, split, tuple(include), tuple(exclude), residual, seed=seed)
    source = _source(model, weights, base)
    return analyse(
        source,
        load_data(data, seed=seed, normalise=source.normalise),
        settings,
        device=device_named(device),
        out=Path(out) if out is not None else None,
        fresh=fresh,
        on_event=on_event,
        command=command,
    )


def search_rates(
    model: str | nn.Module,
    data: Any,
    target: str | None = None,
    *,
    reward: Reward = "accuracy",
    prune: Prune = "channel_pruning",
    episodes: int = EPISODES,
    lowest: float = 0.2,
    multiple: int = 1,
    images: int = 500,
    positions: int = 32,
    samples: int = SAMPLES,
    split: str | None = None,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    residual: Literal["independent", "coupled"] = "coupled",
    weights: str | Path | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    fresh: bool = False,
    on_event: Callable[[dict[str, Any]], None] = quiet,
    command: str | None = None,
) -> AmcResult:
    """How many channels each layer keeps within a budget, by AMC's agent, on a network that is not changed.

    `result.rates` and `result.recipe()` are for `compress`. For the settings see `tersenet.search.amc_settings`.

    Args:
        model: as for `compress`; a module is not changed.
        data: as for `compress`.
        target: `macs=50%`, `params=0.3M`, `latency=60%` or `latency=4ms`: no episode exceeds it.
        out: the folder. The same call with the same folder goes on where it stopped. None: nothing is kept.
        fresh: remove what an earlier search left in `out`.

    Raises:
        TersenetError: anything in the arguments that can't be used; nothing has been evaluated then.
    """
    _check("search", data, {"include": include, "exclude": exclude})
    settings = AmcSettings(
        target, reward, prune, episodes, lowest, multiple, images, positions, samples, split, tuple(include),
        tuple(exclude), residual, seed,
    )  # fmt: skip
    source = _source(model, weights, base)
    return search(
        source,
        load_data(data, seed=seed, normalise=source.normalise),
        settings,
        device=device_named(device),
        out=Path(out) if out is not None else None,
        fresh=fresh,
        on_event=on_event,
        command=command,
    )


def _check(what: str, data: Any, lists: Mapping[str, Iterable[Any]]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TersenetError(f"{what} runs in one process: start it without torchrun")
    if data is None:
        raise TersenetError(f"{what} needs data to evaluate on: give some, such as --data digits")
    for name, value in lists.items():
        if isinstance(value, str):
            raise TersenetError(f"{name} (={value!r}) must be a list, such as [{value!r}]")


def _source(model: str | nn.Module, weights: str | Path | None, base: str | None) -> Source:
    """A module is copied, so that it stays as it is."""
    what = model
    if isinstance(model, nn.Module):
        what = unwrapped(model)
        check_usable(what, inputs=None)
        what = copied(what)
    return Source(what, str(weights) if weights is not None else None, base=base)
