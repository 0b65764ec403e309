"""What a method may do during training. The base does nothing; a method overrides what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tersenet.results import Accuracy
    from tersenet.train.settings import Fit


@dataclass
class TrainState:
    """A training run as hooks see it."""

    model: nn.Module
    """The network itself, never a wrapper; hooks may change its weights in place."""
    ema: nn.Module | None
    """The running average of `model`, if there is one: it is what is validated and kept, so a hook that sets weights
    after an epoch sets them here too."""
    optimizer: torch.optim.Optimizer
    fit: Fit
    epoch: int
    """The epoch that runs, or has just ended, from 0."""
    step: int
    """Optimizer steps done so far, over all epochs."""
    device: torch.device
    evaluate: Callable[[], Accuracy]
    """Accuracy now, of `ema` or else `model`, on the validation split; `n` is 0 if there is none. Every rank must
    call it, or none."""


class Hooks:
    """The base, and the hooks of a method that has none.

    Every rank calls every hook. A hook that depends on weights only, and draws no random numbers, does the same on all.
    """

    def before_training(self, state: TrainState) -> None:
        """Once, before the first epoch of a run that starts fresh; never on resume."""

    def penalty(self, state: TrainState) -> Tensor | None:
        """A scalar to add to the loss of this step."""
        return None

    def before_step(self, state: TrainState) -> None:
        """Gradients are there (unscaled, averaged over ranks, clipped); the weights have not moved yet."""

    def after_step(self, state: TrainState) -> None:
        """The weights have moved; the running average has not yet followed."""

    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        """Before the epoch is validated and saved. Returns plain values for the epoch's row."""
        return {}

    def selectable(self, epoch: int) -> bool:
        """Whether `keep: best` may choose the weights after this epoch."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What resume needs: tensors, numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
