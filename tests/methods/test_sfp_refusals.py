"""What soft filter pruning refuses before training, because it could not be done afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sfp_support import CLASSES, SHAPE, context, settings
from torch import nn

from tersenet.errors import GraphError, TersenetError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.recipe_target import Target


def graph_of(model: nn.Module) -> ModelGraph:
    return ModelGraph(model, (torch.zeros(2, *SHAPE),))


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet_cifar(8, width=10, classes=CLASSES)


@pytest.mark.parametrize("schedule", ["linear", "cubic", "cosine", "asymptotic"])
def test_a_solved_rate_below_the_initial_one(schedule: str) -> None:
    graph = graph_of(small_resnet())
    wants = context(target=Target.parse("macs=90%"), original_macs=graph.macs())
    with pytest.raises(TersenetError, match=r"the macs target is met at rate 0\.\d+, but initial_rate \(=0\.6\)"):
        settings(rate=None, initial_rate=0.6, schedule=schedule).apply(graph, wants)
    settings(rate=None, initial_rate=0.6).apply(graph, wants)


def test_a_solved_rate_without_an_asymptotic_curve() -> None:
    graph = graph_of(small_resnet())
    wants = context(target=Target.parse("macs=50%"), original_macs=graph.macs())
    method = settings(rate=None, schedule="asymptotic", knee=0.8)
    with pytest.raises(TersenetError, match=r"the macs target is met at rate .*, but no asymptotic curve"):
        method.apply(graph, wants)
    with pytest.raises(TersenetError, match="no asymptotic curve"):
        method.preview(graph, wants)
    assert graph.record.edits == ()


def test_fixed_rates_that_meet_the_target_need_no_solved_one() -> None:
    graph = graph_of(small_resnet())
    wants = context(target=Target.parse("macs=90%"), original_macs=graph.macs())
    method = settings(rate=None, rates={"*": 0.4}, initial_rate=0.2, schedule="asymptotic")
    assert set(method.plan(graph, wants).values()) == {0.4}


def test_scores_that_a_layer_does_not_have() -> None:
    model = nn.Sequential(
        *[nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)]
    )
    before = copy.deepcopy(model.state_dict())
    graph = graph_of(model)
    with pytest.raises(TersenetError, match="bn_scale needs a batch norm behind 3, which has none"):
        settings(score="bn_scale").apply(graph, context())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    settings(score="bn_scale", include=("0",)).apply(graph, context())


@pytest.mark.parametrize("exclude", [("layer1.0.convl",), ("*", "layer1.0.convl")])
def test_a_misspelt_exclude(exclude: tuple[str, ...]) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer1.0.convl'; did you mean .*'layer1.0.conv1'"):
        settings(exclude=exclude).plan(graph_of(small_resnet()), context())


@pytest.mark.parametrize("changes", [{}, {"exclude": ()}, {"exclude": ("conv1",)}, {"residual": "coupled"}])
def test_default_excludes_may_match_nothing(changes: dict[str, Any]) -> None:
    """This network has no projections."""
    planned = settings(**changes).plan(graph_of(small_resnet()).with_residual("independent"), context())
    assert ("conv1" in planned) == ("conv1" not in changes.get("exclude", ()))


def test_weights_that_are_not_finite() -> None:
    model = small_resnet()
    model.get_parameter("linear.weight").data[0] = float("nan")
    graph = graph_of(model)
    with pytest.raises(GraphError, match="outputs of the masked network are not finite"):
        settings().apply(graph, context())
    assert graph.record.edits == ()
