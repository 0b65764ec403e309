"""The training loop, the only one there is: visible from end to end, exact on resume."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tersenet import atomic
from tersenet.data.bundle import first_tensor
from tersenet.data.order import derived_seed
from tersenet.errors import TersenetError
from tersenet.results import Accuracy
from tersenet.train import distributed
from tersenet.train.batch import forward, move, to_float32
from tersenet.train.distill import Objective, autocast
from tersenet.train.evaluate import evaluate
from tersenet.train.hooks import Hooks, TrainState
from tersenet.train.optim import copy_buffers, make_optimizer, set_lr, update_average
from tersenet.train.progress import Meter, Progress
from tersenet.train.restore import own_randomness, unchanged_on_failure
from tersenet.train.settings import Fit, lr_at
from tersenet.train.state import Checkpoint, better

if TYPE_CHECKING:
    from tersenet.data.bundle import Data, Loader

Log = Callable[[dict[str, Any]], None]


def fit(
    model: nn.Module,
    data: Data,
    settings: Fit,
    *,
    seed: int,
    device: torch.device | str,
    hooks: Hooks,
    checkpoint: Path | None,
    log: Log,
    teacher: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Trains `model` in place and returns one row per epoch; in the end it holds the kept weights, in eval mode.

    A row has epoch (from 0), lr (of the last step), train_loss (without the hooks' penalty), train_top1, val_loss,
    val_top1 (None where not known), val_metric if the data has a metric, seconds, and the hooks' values. `log` gets
    each row with kind="epoch", and at most once a second kind="progress" (see `Progress`), on rank 0 only.

    If the file `checkpoint` is there, the run goes on after its last epoch, bit-equal to one that never stopped (with
    as many ranks and threads); if it was finished, nothing is trained. Each epoch seeds the global random generators;
    they are put back in the end.

    Raises:
        TersenetError: settings that the data can't satisfy, a loss that is not finite, a checkpoint that is damaged or
            of another run, a full disk. The checkpoint of the last good epoch stays; `model` is as it came,
            whatever was raised.
    """
    device = torch.device(device)
    train = _training_split(data, settings, hooks)
    objective = Objective(settings, data.loss, teacher, device)
    with own_randomness(device), unchanged_on_failure(model):
        state = _prepare(model, data, settings, device)
        kept = model if state.ema is None else state.ema
        scaler = torch.amp.GradScaler(device.type, enabled=settings.amp and device.type == "cuda")
        saved = Checkpoint(checkpoint, seed, state, hooks, scaler)
        if not saved.restore():
            _seed(seed, 0)
            hooks.before_training(state)
            if state.ema is not None:
                # The average starts from what the hooks left.
                state.ema.load_state_dict(model.state_dict())
        if not distributed.is_main():
            log = _silent
        elif checkpoint is not None:
            atomic.remove_leftovers(checkpoint.parent, checkpoint.name)
        progress = Progress(log, settings.epochs, len(train), first_epoch=len(saved.rows))

        for epoch in range(len(saved.rows), settings.epochs):
            began = time.monotonic()
            _seed(seed, epoch)
            state.epoch = epoch
            figures = _train_epoch(state, train, objective, hooks, scaler, progress)
            distributed.broadcast(model.buffers())
            if state.ema is not None:
                copy_buffers(state.ema, model)
            extra = hooks.after_epoch(state)
            accuracy = state.evaluate() if _validates(settings, epoch) else Accuracy(n=0)
            if settings.keep == "best" and accuracy.n > 0 and hooks.selectable(epoch):
                saved.best = better(saved.best, epoch, accuracy, kept)
            row: dict[str, Any] = {"epoch": epoch, **figures, "val_loss": accuracy.loss, "val_top1": accuracy.top1}
            if data.metric is not None:
                row["val_metric"] = accuracy.metric
            row["seconds"] = time.monotonic() - began
            saved.rows.append(row | {name: _plain(value) for name, value in extra.items()})
            if distributed.is_main():
                saved.save()
            log({"kind": "epoch", "epochs": settings.epochs, **saved.rows[-1]})

        model.load_state_dict(kept.state_dict() if saved.best is None else saved.best.weights)
        if settings.channels_last:
            _set_memory_order(model, torch.contiguous_format)
        model.zero_grad(set_to_none=True)
        model.eval()
        return saved.rows


def _prepare(model: nn.Module, data: Data, settings: Fit, device: torch.device) -> TrainState:
    """The network on its device, the same on every rank, with its optimizer and running average."""
    model.to(device)
    distributed.broadcast(model.state_dict().values())
    if settings.channels_last:
        _set_memory_order(model, torch.channels_last)
    ema = None if settings.ema is None else copy.deepcopy(model).eval().requires_grad_(False)

    def validate() -> Accuracy:
        if data.validation is None:
            return Accuracy(n=0)
        network = model if ema is None else ema
        return evaluate(network, data.validation, device=device, loss=data.loss, metric=data.metric)

    optimizer = make_optimizer(model, settings)
    return TrainState(model, ema, optimizer, settings, epoch=0, step=0, device=device, evaluate=validate)


def _train_epoch(
    state: TrainState,
    train: Loader,
    objective: Objective,
    hooks: Hooks,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> dict[str, Any]:
    """One pass over the training split. Returns lr, train_loss and train_top1, the same on all ranks."""
    settings, model, optimizer, device = state.fit, state.model, state.optimizer, state.device
    model.train()
    network = distributed.data_parallel(model, device)
    meter = Meter(settings, state.epoch, len(train))
    lr, step = 0.0, 0
    for step, (inputs, targets) in enumerate(train.batches(state.epoch), start=1):
        lr = lr_at(settings, state.epoch, step - 1, len(train))
        set_lr(optimizer, lr)
        inputs, targets = move(inputs, device, settings.channels_last), move(targets, device)
        with autocast(settings, device):
            outputs = forward(network, inputs)
        outputs = to_float32(outputs)
        loss = objective(inputs, outputs, targets)
        penalty = hooks.penalty(state)
        total = loss if penalty is None else loss + penalty

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        hooks.before_step(state)
        scaler.step(optimizer)
        scaler.update()
        state.step += 1
        hooks.after_step(state)
        if state.ema is not None and settings.ema is not None:
            update_average(state.ema, model, settings.ema, state.step)

        meter.add(loss, total, outputs, targets, len(first_tensor(inputs)))
        if progress.due():
            progress.report(state.epoch, step, meter.settle(), lr)
    if step == 0:
        raise TersenetError("the training split gave no batch")
    meter.settle()
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        meter.diverged(step - 1, "network's weights are not finite")
    return {"lr": lr, **meter.figures(device)}


def _training_split(data: Data, settings: Fit, hooks: Hooks) -> Loader:
    """The training split, once it is known that the settings can be met."""
    if data.train is None or len(data.train) == 0:
        raise TersenetError(
            f"data set {data.name!r} has no training samples, or fewer than one batch: nothing to train on"
        )
    if settings.keep == "best":
        if data.validation is None:
            raise TersenetError(
                f"`keep: best` chooses by the validation split, and data set {data.name!r} has none: set validation "
                "(0.1 keeps a tenth of the training samples apart), or `keep: last`"
            )
        if not any(_validates(settings, epoch) and hooks.selectable(epoch) for epoch in range(settings.epochs)):
            raise TersenetError(
                f"`keep: best` has nothing to choose from: after none of the {settings.epochs} epochs is the network "
                f"both validated (validate_every is {settings.validate_every}) and in its final form"
            )
    return data.train


def _validates(settings: Fit, epoch: int) -> bool:
    return (epoch + 1) % settings.validate_every == 0 or epoch == settings.epochs - 1


def _set_memory_order(model: nn.Module, order: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)


def _seed(seed: int, epoch: int) -> None:
    """Seeds every global generator from (seed, epoch, rank), so that a checkpoint needs no random state."""
    value = derived_seed("fit", seed, epoch, distributed.rank()) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _silent(row: dict[str, Any]) -> None:
    """What ranks other than 0 log."""


def _plain(value: Any) -> Any:
    """A number or list of a tensor or numpy value: a checkpoint holds nothing else."""
    return value.tolist() if hasattr(value, "tolist") else value
