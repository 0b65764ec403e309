"""How to train: frozen settings, and the learning rate as a pure function of them."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Distill(_Settings):
    """Distillation from the uncompressed network: loss = (1 - weight) * task loss + weight * soft loss."""

    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the soft loss."""
    temperature: float = Field(default=4.0, gt=0)
    """Both networks' logits are divided by it; the soft loss is multiplied by its square."""


class Fit(_Settings):
    """One training run. Epochs are counted from 0."""

    epochs: int = Field(ge=1)
    """Passes over the training split."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """`sgd` (with momentum), `adam` (weight decay in the gradient) or `adamw`."""
    lr: float = Field(default=0.1, gt=0)
    """Learning rate before the schedule; schedule `list` does not use it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD; the others do not use it."""
    nesterov: bool = True
    """Nesterov's form of SGD's momentum; without momentum it means nothing."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """On every parameter, those of batch norm included."""
    schedule: Literal["constant", "step", "cosine", "list"] = "constant"
    """`step`: times gamma k from milestone k on; `cosine`: falls to 0 over the run, per step; `list`: `lrs`."""
    milestones: tuple[int, ...] = Field(default=(), validate_default=True)
    """For `step`: the epochs, rising, from which on the rate is multiplied once more."""
    gammas: tuple[float, ...] | float = 0.1
    """For `step`: one factor for all milestones, or one for each."""
    lrs: tuple[float, ...] = Field(default=(), validate_default=True)
    """For `list`: the learning rate of each epoch."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """The rate rises linearly, step by step, over so many epochs, which may be a fraction."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of the cross entropy in training."""
    amp: bool = False
    """Mixed precision: bfloat16 on a CPU, float16 with loss scaling on CUDA."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a running average of the weights, which is then what is validated and kept."""
    distill: Distill | None = None
    """Learn from the uncompressed network too."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest l2 norm of all gradients together."""
    channels_last: bool = True
    """Train in NHWC memory order, which is faster; the network comes back in the usual order."""
    keep: Literal["last", "best"] = "last"
    """The last epoch's weights, or those best on the validation split: by the data's metric, or else top-1."""
    validate_every: int = Field(default=1, ge=1)
    """Validate after every so many epochs, and after the last."""

    @field_validator("milestones")
    @classmethod
    def _milestones_rise(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        _only_with("step", "milestones", value, info)
        if any(epoch < 0 for epoch in value) or any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError("milestones are epochs, counted from 0, each above the one before")
        return value

    @field_validator("gammas")
    @classmethod
    def _one_gamma_per_milestone(cls, value: tuple[float, ...] | float, info: ValidationInfo) -> object:
        factors = value if isinstance(value, tuple) else (value,)
        if any(factor <= 0 for factor in factors):
            raise ValueError("factors must be above 0")
        count = len(info.data.get("milestones", factors))
        if isinstance(value, tuple) and len(value) != count:
            raise ValueError(f"{len(value)} gammas for {count} milestones: give one for each, or one number for all")
        return value

    @field_validator("lrs")
    @classmethod
    def _one_lr_per_epoch(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        _only_with("list", "lrs", value, info)
        if any(lr <= 0 for lr in value):
            raise ValueError("learning rates must be above 0")
        epochs = info.data.get("epochs", len(value))
        if value and len(value) != epochs:
            raise ValueError(f"{len(value)} learning rates for {epochs} epochs: give one for each epoch")
        return value

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_ends(cls, value: float, info: ValidationInfo) -> float:
        epochs = info.data.get("epochs", math.inf)
        if value >= epochs:
            raise ValueError(f"must be below the number of epochs (={epochs})")
        return value


def _only_with(schedule: str, name: str, value: tuple[float, ...], info: ValidationInfo) -> None:
    """A list that the schedule would ignore is a mistake, and so is a schedule without its list."""
    chosen = info.data.get("schedule", schedule)
    if value and chosen != schedule:
        raise ValueError(f"{name} need `schedule: {schedule}`, not {chosen!r}")
    if not value and info.data.get("schedule") == schedule:
        raise ValueError(f"`schedule: {schedule}` needs {name}")


def lr_at(fit: Fit, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of epoch `epoch` (from 0).

    During the warm-up it is the schedule's value times a factor that rises linearly and is 1 at the warm-up's last
    step. The cosine starts where the warm-up ends and would reach 0 one step after the last.
    """
    done = epoch + step / steps_per_epoch
    warm = min(1.0, (done + 1 / steps_per_epoch) / fit.warmup_epochs) if fit.warmup_epochs else 1.0
    if fit.schedule == "list":
        return warm * fit.lrs[epoch]
    if fit.schedule == "cosine":
        progress = max(0.0, done - fit.warmup_epochs) / (fit.epochs - fit.warmup_epochs)
        return warm * fit.lr * 0.5 * (1 + math.cos(math.pi * progress))
    gammas = fit.gammas if isinstance(fit.gammas, tuple) else (fit.gammas,) * len(fit.milestones)
    passed = (gamma for milestone, gamma in zip(fit.milestones, gammas, strict=True) if epoch >= milestone)
    # Without milestones (schedule constant) the product is that of nothing.
    return warm * fit.lr * math.prod(passed)
