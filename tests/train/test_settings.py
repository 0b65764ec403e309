from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from tersenet.train.settings import Distill, Fit, lr_at


def rates(fit: Fit, steps: int = 4) -> list[float]:
    return [lr_at(fit, epoch, step, steps) for epoch in range(fit.epochs) for step in range(steps)]


def test_importing_the_settings_does_not_import_torch() -> None:
    code = "import sys, tersenet.train.settings, tersenet.train.hooks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_constant_rate() -> None:
    assert set(rates(Fit(epochs=3, lr=0.3))) == {0.3}


def test_step_schedule_of_the_published_cifar_recipe() -> None:
    fit = Fit(epochs=200, lr=0.01, schedule="step", milestones=(1, 60, 120, 160), gammas=(10, 0.2, 0.2, 0.2))
    wanted = {0: 0.01, 1: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 199: 0.0008}
    assert {epoch: lr_at(fit, epoch, 5, 10) for epoch in wanted} == pytest.approx(wanted, rel=1e-12)


def test_one_gamma_serves_all_milestones() -> None:
    fit = Fit(epochs=100, lr=0.1, schedule="step", milestones=(30, 60, 90), gammas=0.1)
    assert [lr_at(fit, epoch, 0, 1) for epoch in (29, 30, 60, 90)] == pytest.approx([0.1, 0.01, 0.001, 0.0001])


def test_milestones_after_the_end_of_a_shortened_run_are_allowed() -> None:
    assert set(rates(Fit(epochs=2, lr=0.1, schedule="step", milestones=(60,)))) == {0.1}


def test_list_schedule_takes_the_rates_as_they_are() -> None:
    fit = Fit(epochs=3, schedule="list", lrs=(0.3, 0.2, 0.7))
    assert rates(fit, 2) == [0.3, 0.3, 0.2, 0.2, 0.7, 0.7]


def test_cosine_falls_from_lr_towards_zero_per_step() -> None:
    values = rates(Fit(epochs=2, lr=0.4, schedule="cosine"))
    assert values == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert values[0] == 0.4
    assert values[4] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"schedule": "list", "lrs": (0.4,) * 4},
        {"schedule": "step", "milestones": (3,), "gammas": 0.5},
    ],
)
def test_warm_up_rises_linearly_by_steps_and_ends_at_the_schedule(changes: dict[str, Any]) -> None:
    values = rates(Fit(epochs=4, lr=0.4, warmup_epochs=1.5, **changes))
    assert values[:6] == pytest.approx([0.4 * k / 6 for k in range(1, 7)])
    assert values[6] == pytest.approx(0.4)
    assert max(values) <= 0.4 + 1e-12


def test_cosine_after_a_warm_up_spans_what_is_left() -> None:
    fit = Fit(epochs=3, lr=1.0, schedule="cosine", warmup_epochs=1)
    assert lr_at(fit, 2, 0, 4) == pytest.approx(0.5)
    assert lr_at(fit, 2, 3, 4) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({"epochs": 0}, "epochs", "greater than or equal to 1"),
        ({"lr": 0}, "lr", "greater than 0"),
        ({"lr": math.nan}, "lr", "finite"),
        ({"momentum": 1}, "momentum", "less than 1"),
        ({"optimizer": "lion"}, "optimizer", "'sgd', 'adam' or 'adamw'"),
        ({"epoch": 3}, "epoch", "not permitted"),
        ({"schedule": "step"}, "milestones", "needs milestones"),
        ({"milestones": (1,)}, "milestones", "need `schedule: step`, not 'constant'"),
        ({"schedule": "step", "milestones": (3, 3)}, "milestones", "each above the one before"),
        ({"schedule": "step", "milestones": (-1,)}, "milestones", "counted from 0"),
        ({"schedule": "step", "milestones": (1, 2), "gammas": (0.1,)}, "gammas", "1 gammas for 2 milestones"),
        ({"gammas": -0.1}, "gammas", "above 0"),
        ({"schedule": "list"}, "lrs", "needs lrs"),
        ({"schedule": "list", "lrs": (0.1,)}, "lrs", "1 learning rates for 4 epochs"),
        ({"schedule": "list", "lrs": (0.1, 0, 0.1, 0.1)}, "lrs", "above 0"),
        ({"schedule": "cosine", "lrs": (0.1,) * 4}, "lrs", "need `schedule: list`"),
        ({"warmup_epochs": 4}, "warmup_epochs", "below the number of epochs (=4)"),
        ({"label_smoothing": 1}, "label_smoothing", "less than 1"),
        ({"ema": 1}, "ema", "less than 1"),
        ({"distill": {"weight": 0}}, "distill", "greater than 0"),
        ({"clip_grad": 0}, "clip_grad", "greater than 0"),
        ({"validate_every": 0}, "validate_every", "greater than or equal to 1"),
    ],
)
def test_bad_settings_are_refused_at_their_place(settings: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Fit(**({"epochs": 4} | settings))
    errors = caught.value.errors()
    assert {error["loc"][0] for error in errors} == {place}
    assert words in errors[-1]["msg"]


def test_settings_are_frozen_and_survive_json() -> None:
    fit = Fit(epochs=2, schedule="step", milestones=(1,), gammas=(0.5,), distill=Distill(weight=0.2))
    assert Fit.model_validate_json(fit.model_dump_json()) == fit
    with pytest.raises(ValidationError):
        fit.lr = 1  # pyright: ignore
