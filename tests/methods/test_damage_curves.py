"""Damage at every number left, from trials at a few: where little is left it may be of another kind than above."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sfp_support import CLASSES, CPU, SHAPE, Batches
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.calibration.curves import measured_curves
from tersenet.calibration.damage import damage_curve
from tersenet.calibration.images import Images
from tersenet.calibration.items import find_items
from tersenet.calibration.low_rank_layers import find_splittable
from tersenet.calibration.low_rank_solver import Splitter
from tersenet.calibration.solver import Solver
from tersenet.graph.model import ModelGraph
from tersenet.nn.low_rank import Form

EXAMPLE = (torch.zeros(2, *SHAPE),)


class Quiet(nn.Module):
    """Of what `body` gives, the classifier reads only output 0, which has a channel of its own. It is weak: the two
    channels that all other outputs are made of say more of the responses. All further channels say next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.stem.weight.copy_(torch.randn(16, 3, 3, 3))
            self.body.weight.mul_(1e-2)
            for channel, strength in ((1, 3.0), (2, 2.0)):
                column, row, outputs = torch.randn(3), torch.randn(3), torch.randn(15)
                self.body.weight[1:, channel] = strength * torch.einsum("o,h,w->ohw", outputs, column, row)
            self.body.weight[0] = 0.0
            self.body.weight[0, 0, 1, 1] = 0.3
            self.head.weight[:, 1:] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3)))


def images() -> Images:
    return Images(Batches(96, 32, 1), 64, 16, 0, CPU)


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_the_curve_of_ranks_is_the_damage_that_is_done(form: Form) -> None:
    model = Quiet().eval()
    graph = ModelGraph(model, EXAMPLE)
    splitter = Splitter(graph, form, images(), relu=True)
    (layer,) = find_splittable(graph, form, ("body",), (), pointwise=False).chosen
    before = copy.deepcopy(model.state_dict())
    found = splitter.curves([layer], "measured")["body"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ((splitting, moments),) = splitter._moments([layer])  # pyright: ignore[reportPrivateUsage]
    done = np.array([splitter._damage(splitting, moments, rank) for rank in range(1, layer.size)])  # pyright: ignore[reportPrivateUsage]
    check(found[1:-1], done)


def test_the_curve_of_channels_is_the_damage_that_is_done() -> None:
    graph = ModelGraph(Quiet().eval(), EXAMPLE)
    solver = Solver(graph, images(), "lasso", reconstruct=True)
    (item,) = find_items(graph, ("stem",), (), sample=False).all
    found = measured_curves(solver, [item])[item.name]
    known = solver.statistics(item.readers)
    done: list[float] = []
    for count in range(1, item.size):
        with solver.trial([item]):
            solver.remove(item, solver.choice(item, known).kept(count))
            for reader in item.readers:
                solver.fit(reader, known[reader.end])
            done.append(solver.damage())
    check(found[1:-1], np.array(done))


def check(found: NDArray[np.float64], done: NDArray[np.float64]) -> None:
    """With one or two left of the three that are needed everything is lost, though a quarter of all are enough."""
    assert (done[:2] > 0.5).all()
    assert (done[3:] < 0.01).all()
    assert found[0] == pytest.approx(done[0], rel=0.2)
    assert (found[3:] < 0.01).all()


def test_between_trials_the_damage_of_one_unit_of_error_is_interpolated() -> None:
    errors, tried = np.linspace(1, 0, 17) ** 2, list[int]()

    def damage_at(count: int) -> float:
        tried.append(count)
        return errors[count] * {1: 5.0, 2: 4.0, 4: 2.0}.get(count, 1.0)

    found = damage_curve(errors, damage_at)
    assert tried == [1, 2, 4, 8, 12]
    np.testing.assert_allclose(found / np.append(errors[:-1], 1), [5, 5, 4, 3, 2, 1.75, 1.5, 1.25, *[1] * 8, 0])
    np.testing.assert_array_equal(damage_curve(np.array([0.3, 0.0]), damage_at), [0.3, 0.0])
    assert len(tried) == 5


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_the_worst(lost: float) -> None:
    errors = np.linspace(1, 0, 17)
    found = damage_curve(errors, lambda count: lost if count < 3 else errors[count])
    assert np.isfinite(found).all()
    assert (found[:3] > 1e11).all()
    np.testing.assert_allclose(found[4:], errors[4:])
    assert np.isfinite(damage_curve(errors, lambda count: lost)).all()
