"""What a running epoch tells: figures gathered without waiting for the device, a line a second, an early end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.train import distributed
from tersenet.train.batch import correct, is_classification
from tersenet.train.settings import Fit, lr_at
from tersenet.train.state import START_AGAIN


class Meter:
    """Sums over one epoch's batches. They stay on the device until `settle`, so that steps do not wait for them."""

    def __init__(self, settings: Fit, epoch: int, steps: int) -> None:
        self.settings = settings
        self.epoch = epoch
        self.steps = steps
        self.done = 0
        self._waiting: list[Tensor] = []
        # sum of losses; samples; right ones; samples with a top-1
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, loss: Tensor, total: Tensor, outputs: Any, targets: Any, n: int) -> None:
        """One batch of `n` samples: its `loss`, and the `total` that was minimised."""
        counted = is_classification(outputs, targets)
        right = correct(outputs, targets).float() if counted else torch.zeros_like(loss)
        known = torch.full_like(right, n if counted else 0)
        batch = torch.stack([loss.detach() * n, torch.full_like(right, n), right, known, total.detach()])
        self._waiting.append(batch)

    def settle(self) -> float:
        """Takes in what waits and returns the mean loss so far. Raises: TersenetError at the first step not finite."""
        if self._waiting:
            batches = torch.stack(self._waiting).cpu().double()
            self._waiting.clear()
            bad = (~batches[:, 4].isfinite()).nonzero()
            if len(bad):
                self.diverged(self.done + int(bad[0]), f"loss is {float(batches[int(bad[0]), 4])}")
            self._sums += batches[:, :4].sum(0)
            self.done += len(batches)
        return float(self._sums[0] / self._sums[1])

    def figures(self, device: torch.device) -> dict[str, Any]:
        """train_loss and train_top1 (None unless every batch had labels and logits) over all ranks."""
        loss, n, right, known = distributed.all_reduce_sum(self._sums, device).tolist()
        return {"train_loss": loss / n, "train_top1": right / n if known == n else None}

    def diverged(self, step: int, what: str) -> None:
        """Raises: TersenetError, with the place and the way out."""
        lr = lr_at(self.settings, self.epoch, step, self.steps)
        clip = "set clip_grad (1.0 is usual)" if self.settings.clip_grad is None else "lower clip_grad"
        raise TersenetError(
            f"training diverged: the {what} at epoch {self.epoch} (from 0), step {step} of {self.steps}, with lr "
            f"{lr:.3g}. Lower lr, add warmup_epochs or {clip}, and {START_AGAIN}."
        )


class Progress:
    """Gives `log` a row of kind="progress", at most once a second.

    It has epoch (from 0), epochs, step (steps done), steps, loss (mean of the epoch so far), lr and eta_seconds (to the
    end of the last epoch, validation included).
    """

    def __init__(self, log: Callable[[dict[str, Any]], None], epochs: int, steps: int, first_epoch: int) -> None:
        self.log = log
        self.epochs = epochs
        self.steps = steps
        self.first_epoch = first_epoch
        self.began = self.last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= 1.0

    def report(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """After `step` steps of `epoch`."""
        self.last = time.monotonic()
        done = (epoch - self.first_epoch) * self.steps + step
        left = (self.epochs - epoch) * self.steps - step
        self.log(
            {
                "kind": "progress",
                "epoch": epoch,
                "epochs": self.epochs,
                "step": step,
                "steps": self.steps,
                "loss": loss,
                "lr": lr,
                "eta_seconds": (self.last - self.began) / done * left,
            }
        )
