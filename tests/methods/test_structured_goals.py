"""Structured sparsification beyond its specification's facts: shared trunks, measured time, what the report shows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from sfp_support import CLASSES, CPU, SHAPE, context, tiny_data
from structured_support import gathers, graph_of, hooks_on, settings
from torch import nn

from graph_support import DenseNet, compare_on, randomise
from tersenet.errors import TersenetError
from tersenet.graph.grouping import group_convolutions, mask_groups, trunk_ties
from tersenet.graph.model import ModelGraph
from tersenet.group_learning import costs
from tersenet.group_learning.costs import Costs
from tersenet.group_learning.maps import group_map, times
from tersenet.measuring.layer_latency import Shape, Tile, Wanted
from tersenet.models.resnet import Bottleneck, ResNet
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.train.loop import fit

EXAMPLE = (torch.zeros(2, *SHAPE),)


def projected() -> nn.Module:
    torch.manual_seed(0)
    return resnet_cifar(8, width=8, classes=CLASSES, projection=True)


# -- one order on a trunk


def test_the_sides_on_trunks() -> None:
    graph = ModelGraph(ResNet(Bottleneck, (2, 1, 1, 1), 4, 3, 8), (torch.zeros(2, 3, 32, 32),))
    names = [name for name, module in graph.model.named_modules() if isinstance(module, nn.Conv2d)][1:]
    ties = [frozenset(tie) for tie in trunk_ties(graph, names)]
    assert len(ties) == 5
    assert {tie for tie in ties if not any(name.startswith(("layer3", "layer4")) for name, _ in tie)} == {
        # Of the stem, which is not grouped, only readers.
        frozenset({("layer1.0.conv1", "columns"), ("layer1.0.downsample.0", "columns")}),
        frozenset(
            {
                ("layer1.0.conv3", "rows"),
                ("layer1.0.downsample.0", "rows"),
                ("layer1.1.conv1", "columns"),
                ("layer1.1.conv3", "rows"),
                ("layer2.0.conv1", "columns"),
                ("layer2.0.downsample.0", "columns"),
            }
        ),
    }
    dense = graph_of(DenseNet())
    assert trunk_ties(dense, [n for n, m in dense.model.named_modules() if isinstance(m, nn.Conv2d)]) == []


def test_a_layer_from_a_trunk_to_itself_is_tied_by_what_it_writes() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.one(x).relu()
            return self.head((x + self.two(x).relu()).mean((2, 3)))

    graph = ModelGraph(Loop(), (torch.zeros(2, 3, 8, 8),))
    assert trunk_ties(graph, ["one", "two"]) == [(("one", "rows"), ("two", "rows"))]


@pytest.mark.parametrize(
    ("build", "size", "blocks", "inner"),
    [
        (lambda: resnet_cifar(8, width=8, projection=True), 16, 3, 1),
        (lambda: ResNet(Bottleneck, (1, 1, 1, 1), 4, 3, 8), 32, 4, 2),
    ],
)
def test_a_shared_trunk_has_no_gathers(build: Any, size: int, blocks: int, inner: int) -> None:
    """Left are those inside the blocks, one between two grouped convolutions."""
    torch.manual_seed(0)
    found: dict[str, int] = {}
    for trunks in ("own", "shared"):
        model = randomise(build()).double()
        hooks = hooks_on(model, settings(sparsity=0.5, trunks=trunks), shape=(3, size, size))
        groupings = hooks.decide()
        assert len(groupings) == len(hooks.layers), "every layer is grouped"
        mask_groups(hooks.graph, groupings)
        masked = copy.deepcopy(model)
        assert group_convolutions(hooks.graph, groupings).relative <= 1e-10
        assert compare_on(masked, model, (torch.randn(3, 3, size, size, dtype=torch.float64),)) <= 1e-10
        found[trunks] = gathers(model)
    assert found["shared"] == blocks * inner
    assert found["own"] > 2 * found["shared"]


def test_training_keeps_shared_orders() -> None:
    model = projected()
    method = settings(trunks="shared", every_steps=2, restarts=1)
    hooks = hooks_on(model, method)
    fit(model, tiny_data(), method.fit, seed=3, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
    assert hooks.ties
    for (first, side), *others in hooks.ties:
        order = getattr(hooks.orders[first], side)
        assert all(np.array_equal(order, getattr(hooks.orders[name], other)) for name, other in others)
    assert any(not np.array_equal(o.rows, np.arange(len(o.rows))) for o in hooks.orders.values())


# -- time


def test_the_cheapest_level_that_is_allowed() -> None:
    found = Costs("measured time", {"a": [4.0, 2.0, 3.0, 1.0], "b": [2.0, 2.5]}, {"a": (1, 2, 4, 8), "b": (1, 2)})
    assert [found.best("a", level) for level in (1, 2, 3, 4)] == [1, 2, 2, 4]
    assert found.groups({"a": 3, "b": 2}) == {"a": 2, "b": 1}
    assert found.saved({"a": 3, "b": 2}) == found.saved_by_groups({"a": 2}) == pytest.approx(2 / 6)
    assert found.saved({"a": 4, "b": 2}) == pytest.approx(3 / 6)


class FakeTable:
    """Two groups take 60 % of the time, four as much as one, and eight half, 16 again more: not always faster."""

    def __init__(self, rows: Iterable[Wanted], batch: int) -> None:
        assert {(tile, bits) for _, _, tile, bits in rows} == {("direct", None)}
        assert batch == 1

    def ms(self, shape: Shape, tile: Tile, bits: int | None) -> float:
        share = {1: 1.0, 2: 0.6, 4: 1.0, 8: 0.5, 16: 0.7}[shape.groups]
        return share * shape.in_channels * shape.out_channels


@pytest.mark.parametrize("trim", [False, True])
def test_a_goal_in_time(monkeypatch: pytest.MonkeyPatch, trim: bool) -> None:
    monkeypatch.setattr(costs, "measure_table", FakeTable)
    model = projected()
    hooks = hooks_on(model, settings(sparsity=None, latency=0.65, trim=trim), target="params=1%")
    groupings = hooks.decide()
    assert {grouping.groups for grouping in groupings.values()} <= {2, 8}
    sizes = {name: layer.C_in * layer.C_out for name, layer in hooks.layers.items()}
    left = {n: {2: 0.6, 8: 0.5}[groupings[n].groups] if n in groupings else 1.0 for n in sizes}
    assert sum(share * sizes[name] for name, share in left.items()) <= 0.65 * sum(sizes.values())
    assert "measured time went (asked for 35.00%)" in hooks.describe(groupings)[0]
    with pytest.raises(TersenetError, match=r"latency 0\.4 can't be met: .* finest groups save"):
        hooks_on(projected(), settings(sparsity=None, latency=0.4))


def test_two_goals_are_refused() -> None:
    with pytest.raises(ValueError, match="two goals"):
        settings(sparsity=0.4, latency=0.5)


@pytest.mark.slow
def test_time_is_measured_here() -> None:
    hooks = hooks_on(projected(), settings(sparsity=None, latency=1.0))
    for name, measured in hooks.costs.levels.items():
        assert len(measured) == hooks.allowed[name]
        assert all(0 < ms < 1000 for ms in measured)
    assert hooks.decide() == {}


# -- what the report shows


def test_maps_are_of_the_learned_order() -> None:
    model = projected()
    method = settings(warmup=0, strength=0.02, sparsity=0.5)
    hooks = hooks_on(model, method)
    fit(model, tiny_data(), method.fit, seed=3, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
    done = context(evaluate=lambda: None)
    kernels = hooks.norms(model)
    method.finish(hooks.graph, done, hooks)
    layers = [name for name, allowed in hooks.allowed.items() if allowed > 1]
    assert [(shown.epoch, shown.name) for shown in done.maps] == [(e, n) for e in range(5) for n in layers]
    for shown in done.maps[-len(layers) :]:
        conv = model.get_submodule(shown.name)
        assert shown.groups == (conv.groups if isinstance(conv, GroupShuffleConv2d) else 1)
        S = kernels[shown.name]
        left = float(model.get_parameter(f"{shown.name}.weight").detach().double().abs().sum())
        assert shown.kept == pytest.approx(left / S.sum(), abs=1e-5)
        assert (len(shown.cells), len(shown.cells[0])) == (min(16, S.shape[0]), min(16, S.shape[1]))
        assert shown.groups == 1 or shown.kept > 1.1 / shown.groups, "more than in any order"


def test_a_map_is_small() -> None:
    S = np.zeros((64, 100))
    S[0, 0], S[63, 99] = 3.0, 1.0
    shown = group_map("a", 2, S, 2, 4.0)
    assert shown.kept == 1.0
    assert (len(shown.cells), len(shown.cells[0])) == (16, 16)
    # Means of four by six channels, and of four by seven: 3 / 24 and 1 / 28.
    assert (shown.cells[0][0], shown.cells[15][15]) == ("f", "4")
    assert sum(digit != "0" for row in shown.cells for digit in row) == 2
    dead = group_map("b", 0, np.zeros((8, 4)), 1, 0.0)
    assert dead.cells == ["0000"] * 8
    assert dead.kept == 1.0


def test_when_maps_are_made() -> None:
    """The last time, after all epochs, is the decision's."""
    assert times(20, 100) == {0, 25, 50, 75}
    assert times(20, 2) == {0, 1}
    assert times(200, 60) == {0}
