from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_support import CLASSES, Batches, Recorder, data, everything, network, plain_network, same, settings_of, train

from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.errors import TersenetError
from tersenet.results import Accuracy
from tersenet.train import progress
from tersenet.train.evaluate import evaluate
from tersenet.train.hooks import Hooks
from tersenet.train.restore import own_randomness
from tersenet.train.settings import lr_at


def test_it_learns_and_reports_each_epoch() -> None:
    model, logged = network(), []
    rows = train(model, settings_of(epochs=8), log=logged.append)
    assert [row["epoch"] for row in rows] == list(range(8))
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert rows[-1]["val_top1"] > 0.8
    assert set(rows[0]) == {"epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "seconds"}
    assert [row for row in logged if row["kind"] == "epoch"] == [{"kind": "epoch", "epochs": 8, **row} for row in rows]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    validation = data().validation
    assert validation is not None
    assert evaluate(model, validation, device="cpu").top1 == rows[-1]["val_top1"]


def test_one_step_of_the_loop_equals_sgd_by_hand() -> None:
    """Nesterov momentum, weight decay, label smoothing and clipping: two epochs of one step each."""
    model, reference = plain_network(), plain_network()
    settings = settings_of(
        epochs=2, lr=0.1, schedule="list", lrs=(0.1, 0.2), weight_decay=0.01, label_smoothing=0.1, clip_grad=0.5,
        channels_last=False,
    )  # fmt: skip
    loader = Batches(16, 16, 1, shuffle=False)
    train(model, settings, data=data(train=loader))
    momentum = [torch.zeros_like(p) for p in reference.parameters()]
    for lr in (0.1, 0.2):
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(reference(loader.x), loader.y)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > 0.5
        with torch.no_grad():
            for parameter, gradient, buffer in zip(reference.parameters(), gradients, momentum, strict=True):
                gradient = gradient * (0.5 / norm) + 0.01 * parameter
                buffer.mul_(0.9).add_(gradient)
                parameter -= lr * (gradient + 0.9 * buffer)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_same_call_gives_the_same_bits_whatever_the_global_generators_did() -> None:
    first, second = network(), network()
    rows = train(first, everything(), teacher=network(5))
    torch.rand(17)
    again = train(second, everything(), teacher=network(5))
    assert same(first, second)
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in again]
    other = network()
    train(other, everything(), teacher=network(5), seed=4)
    assert not same(first, other)


def test_channels_last_is_used_in_training_and_undone_after() -> None:
    seen: list[bool] = []

    class Look(Hooks):
        def before_step(self, state: Any) -> None:
            seen.append(state.model[0].weight.is_contiguous(memory_format=torch.channels_last))

    model = network()
    train(model, hooks=Look())
    assert all(seen)
    assert model[0].weight.is_contiguous()
    train(model, settings_of(channels_last=False), hooks=Look())
    assert not seen[-1]


def test_hooks_are_called_in_order_and_reach_rows_gradients_and_loss() -> None:
    class Check(Recorder):
        def before_step(self, state: Any) -> None:
            super().before_step(state)
            self.frozen = state.model[0].weight[1].clone()

        def after_step(self, state: Any) -> None:
            super().after_step(state)
            # Its gradient was zeroed and there is no decay: with momentum 0 it stays.
            assert torch.equal(state.model[0].weight[1], self.frozen)
            assert state.step == self.steps

    hooks = Check()
    rows = train(network(), settings_of(epochs=2, momentum=0.0), hooks=hooks)
    step = ["penalty", "before_step", "after_step"]
    assert hooks.calls == ["before_training", *(step * 6 + ["after_epoch"]) * 2]
    assert [row["steps"] for row in rows] == [6, 12]
    assert all(type(row["norm"]) is float for row in rows)


def test_a_penalty_is_minimised_but_not_part_of_train_loss() -> None:
    class Huge(Hooks):
        def penalty(self, state: Any) -> Tensor:
            return 100 * state.model[7].weight.square().sum()

    model = network()
    rows = train(model, settings_of(lr=1e-3, momentum=0), hooks=Huge())
    assert model[7].weight.abs().max() < 0.1 * network()[7].weight.abs().max()
    assert rows[0]["train_loss"] < 5


def test_average_is_validated_and_kept_with_copied_buffers() -> None:
    seen: dict[str, Any] = {}

    class Look(Hooks):
        def after_epoch(self, state: Any) -> dict[str, Any]:
            seen["ema"] = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
            seen["model"] = state.model[0].weight.detach().clone()
            seen["buffers"] = all(
                torch.equal(a, b) for a, b in zip(state.ema.buffers(), state.model.buffers(), strict=True)
            )
            return {"by_hook": state.evaluate().top1}

    model = network()
    rows = train(model, settings_of(ema=0.9), hooks=Look())
    assert seen["buffers"]
    assert not torch.equal(seen["ema"]["0.weight"], seen["model"])
    assert all(torch.equal(tensor, seen["ema"][name]) for name, tensor in model.state_dict().items())
    assert all(row["by_hook"] == row["val_top1"] for row in rows)


def test_the_average_starts_from_what_before_training_left() -> None:
    class Look(Hooks):
        def before_training(self, state: Any) -> None:
            nn.init.constant_(state.model[7].bias, 7.0)

        def penalty(self, state: Any) -> None:
            if state.step == 0:
                assert float(state.ema[7].bias[0]) == 7.0

    train(network(), settings_of(epochs=1, ema=0.5), hooks=Look())


class Spoil(Hooks):
    """Makes the network useless after the named epochs."""

    def __init__(self, spoilt: set[int], selectable: set[int] | None = None) -> None:
        self.spoilt, self.chosen = spoilt, selectable

    def after_epoch(self, state: Any) -> dict[str, Any]:
        if state.epoch in self.spoilt:
            nn.init.zeros_(state.model[7].weight)
        return {}

    def selectable(self, epoch: int) -> bool:
        return self.chosen is None or epoch in self.chosen


def test_keep_best_takes_the_weights_of_the_best_validated_selectable_epoch() -> None:
    model = network()
    rows = train(model, settings_of(epochs=6, keep="best"), hooks=Spoil({4, 5}))
    best = max(row["val_top1"] for row in rows)
    validation = data().validation
    assert validation is not None
    assert rows[-1]["val_top1"] < best
    assert evaluate(model, validation, device="cpu").top1 == best

    model = network()
    rows = train(model, settings_of(epochs=6, keep="best"), hooks=Spoil({4, 5}, selectable={0, 5}))
    assert evaluate(model, validation, device="cpu").top1 == rows[0]["val_top1"]


def test_keep_last_keeps_a_worse_last_epoch() -> None:
    model = network()
    train(model, settings_of(epochs=6), hooks=Spoil({5}))
    assert int(model[7].weight.count_nonzero()) == 0


def test_validate_every_leaves_gaps_and_always_validates_the_last() -> None:
    rows = train(network(), settings_of(epochs=6, validate_every=4, keep="best"))
    assert [row["val_top1"] is not None for row in rows] == [False, False, False, True, False, True]


def test_without_a_validation_split() -> None:
    seen: list[Accuracy] = []

    class Look(Hooks):
        def after_epoch(self, state: Any) -> dict[str, Any]:
            seen.append(state.evaluate())
            return {}

    rows = train(network(), data=data(validation=None), hooks=Look())
    assert {row["val_loss"] for row in rows} == {None}
    assert seen == [Accuracy(n=0)] * 3


def test_own_loss_and_metric() -> None:
    def regression(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square().mean()

    def closeness(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs[:, 0] - targets).abs()

    own = replace(data(), loss=regression, metric=closeness)
    rows = train(network(), settings_of(epochs=6, lr=0.01, keep="best"), data=own)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_metric"] > rows[0]["val_metric"]


def test_mixed_precision_on_a_cpu_computes_the_loss_in_float32() -> None:
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    model, exact = network(), network()
    rows = train(model, settings_of(amp=True), data=replace(data(), loss=loss))
    train(exact, settings_of())
    assert set(seen) == {torch.float32}
    assert model[0].weight.dtype == torch.float32
    assert not same(model, exact)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_adamw_and_distillation_train() -> None:
    teacher = network(5)
    train(teacher, settings_of(epochs=8))
    kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    model = network()
    settings = settings_of(epochs=6, optimizer="adamw", lr=0.01, distill={"weight": 0.9})
    rows = train(model, settings, teacher=teacher)
    assert rows[-1]["val_top1"] > 0.7
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_progress_comes_at_most_once_a_second_with_an_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]

    class Slow(Hooks):
        def after_step(self, state: Any) -> None:
            clock[0] += 0.4

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    monkeypatch.setattr(progress, "time", Clock)
    logged: list[dict[str, Any]] = []
    settings = settings_of(epochs=2, schedule="cosine")
    train(network(), settings, hooks=Slow(), log=logged.append)
    rows = [row for row in logged if row["kind"] == "progress"]
    # 12 steps of 0.4 s: after every third.
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 3), (0, 6), (1, 3), (1, 6)]
    assert [row["eta_seconds"] for row in rows] == pytest.approx([3.6, 2.4, 1.2, 0.0], abs=1e-6)
    assert {(row["epochs"], row["steps"]) for row in rows} == {(2, 6)}
    assert rows[0]["lr"] == lr_at(settings, 0, 2, 6)
    assert 0 < rows[0]["loss"] < 10


class NaNAt(Hooks):
    def __init__(self, step: int) -> None:
        self.at = step

    def penalty(self, state: Any) -> Tensor | None:
        return torch.tensor(math.nan) if state.step == self.at else None


def test_a_loss_that_is_not_finite_ends_with_place_and_way_out(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    settings = settings_of(schedule="step", milestones=(1,), gammas=0.5)
    with pytest.raises(TersenetError) as caught:
        train(network(), settings, hooks=NaNAt(8), checkpoint=path)
    message = str(caught.value)
    for part in ("loss is nan", "epoch 1", "step 2 of 6", "lr 0.025", "Lower lr", "clip_grad", "--fresh"):
        assert part in message
    assert "removes the whole run" in message
    assert "fresh=True" in message
    rows = torch.load(path, weights_only=True)["rows"]
    assert [row["epoch"] for row in rows] == [0]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Break(Hooks):
        def after_step(self, state: Any) -> None:
            if state.step == 12:
                nn.init.constant_(state.model[7].bias, math.inf)

    with pytest.raises(TersenetError, match=r"weights are not finite at epoch 1 \(from 0\), step 5 of 6"):
        train(network(), hooks=Break(), checkpoint=tmp_path / "c.pt", data=data(validation=None))
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["rows"]) == 1


class Unselectable(Hooks):
    def selectable(self, epoch: int) -> bool:
        return epoch == 1


@pytest.mark.parametrize(
    ("changes", "given", "hooks", "words"),
    [
        ({}, data(train=None), Hooks(), "nothing to train on"),
        ({"keep": "best"}, data(validation=None), Hooks(), "'noise' has none: set validation"),
        ({"keep": "best", "validate_every": 3}, data(), Unselectable(), "nothing to choose from"),
        ({"distill": {}}, data(), Hooks(), "teacher"),
        ({"label_smoothing": 0.1}, replace(data(), loss=nn.functional.mse_loss), Hooks(), "label_smoothing"),
    ],
)
def test_settings_that_can_not_be_met_are_refused_before_anything_happens(
    changes: dict[str, Any], given: Data, hooks: Hooks, words: str
) -> None:
    model = network()
    with pytest.raises(TersenetError, match=words):
        train(model, settings_of(**changes), data=given, hooks=hooks)
    assert same(model, network())


def test_labels_beyond_the_networks_classes() -> None:
    loader = Batches(16, 8, 1)
    loader.y += CLASSES
    with pytest.raises(TersenetError, match="one output per class"):
        train(network(), data=data(train=loader))


def test_figures_are_read_back_once_an_epoch_unless_progress_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    original = progress.Meter.settle
    monkeypatch.setattr(progress.Meter, "settle", lambda self: settled.append(self.epoch) or original(self))
    monkeypatch.setattr(progress.Progress, "due", lambda self: False)
    train(network())
    assert settled == [0, 1, 2]


class Breaks(Hooks):
    """After a few steps: the given error, or weights that are not finite."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def after_step(self, state: Any) -> None:
        if state.step == 8:
            if self.error is not None:
                raise self.error
            state.model[0].weight.data.fill_(math.nan)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("a hook's")])
def test_a_training_that_fails_leaves_the_network_as_it_came(error: BaseException | None) -> None:
    model = network()
    model[3].train(False)
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(TersenetError if error is None else type(error)):
        train(model, settings_of(ema=0.9), hooks=Breaks(error))
    assert same(model, network())
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_of_another_shape_are_said_in_training_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, CLASSES))
    with pytest.raises(TersenetError, match=r"Sequential failed on a batch of inputs \(16, 2, 6, 6\): "):
        train(model)


@pytest.mark.parametrize("hooks", [Hooks(), NaNAt(8)], ids=["done", "failed"])
def test_the_callers_random_generators_and_flags_are_put_back(hooks: Hooks) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    with suppress(TersenetError):
        train(network(), hooks=hooks)
    assert draw() == expected


def test_cudnn_is_deterministic_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", before)
        with suppress(KeyError), own_randomness(torch.device("cuda")):
            assert torch.backends.cudnn.deterministic
            raise KeyError
        assert torch.backends.cudnn.deterministic is before


def test_a_one_dimensional_network_is_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 16, generator=generator), torch.arange(8) % 4) for _ in range(3)]
    bundle = load_data({"train": batches, "validation": batches})
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 4))
    rows = train(model, settings_of(epochs=8), data=bundle)
    assert bundle.shape == (3, 16)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
