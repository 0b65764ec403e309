from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.errors import GraphError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import check_patterns, matches, select_groups
from tersenet.models.resnet_cifar import resnet_cifar


def graph_of(residual: str = "independent") -> ModelGraph:
    return ModelGraph(resnet_cifar(8, width=4), (torch.zeros(1, 3, 8, 8),), residual)  # pyright: ignore


def names(graph: ModelGraph, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> list[str]:
    return [group.name for group in select_groups(graph, include, exclude)]


def test_patterns_match_over_dots() -> None:
    assert matches("layer1.0.conv1", ["layer1*"])
    assert matches("layer1.0.conv1", ["nothing", "*.conv?"])
    assert not matches("layer1.0.conv1", ["conv1"])


def test_include_and_exclude() -> None:
    graph = graph_of()
    assert names(graph) == ["conv1"] + [f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert names(graph, ("layer2*", "conv1")) == ["conv1", "layer2.0.conv1", "layer2.0.conv2"]
    assert names(graph, ("*",), ("*conv2", "conv1")) == [f"layer{i}.0.conv1" for i in (1, 2, 3)]
    assert names(graph, ("*",), ("*",)) == []


def test_of_a_tied_group_all_layers_must_be_included() -> None:
    graph = graph_of("coupled")
    assert graph.group("conv1").producers[:2] == ("conv1", "layer1.0.conv2")
    assert "conv1" in names(graph)
    assert "conv1" not in names(graph, ("*",), ("layer1.0.conv2",))
    assert "conv1" not in names(graph, ("conv1",))


def test_linear_layers_are_not_selected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = ModelGraph(model, (torch.zeros(1, 3, 8, 8),))
    assert names(graph) == ["0"]
    assert graph.group("2").frozen is None


def test_unknown_names_offer_the_nearest() -> None:
    graph = graph_of()
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer1.0.convl'; did you mean .*'layer1.0.conv1'"):
        select_groups(graph, ("layer1.0.convl",), ())
    with pytest.raises(UnknownNameError, match="tersenet measure"):
        check_patterns(["xyz*"], ["conv1"])
    check_patterns([], [])
    with pytest.raises(GraphError, match=r"no channel group 'conv9'; the groups are conv1, "):
        graph.group("conv9")


def test_patterns_that_exclude_are_checked_but_defaults_are_not() -> None:
    graph = graph_of()
    with pytest.raises(UnknownNameError, match=r"'layer1.0.convl'; did you mean .*'layer1.0.conv1'"):
        select_groups(graph, ("*",), ("layer1.0.convl",))
    chosen = select_groups(graph, ("*",), ("conv1",), default_exclude=("*downsample*", "layer1*"))
    assert [group.name for group in chosen] == [f"layer{i}.0.conv{j}" for i in (2, 3) for j in (1, 2)]


def test_alive_units_have_some_weight_in_some_layer() -> None:
    graph = graph_of("coupled")
    group = graph.group("conv1")
    for weight, axis, places in graph.filters(group):
        weight.data.index_fill_(axis, torch.from_numpy(places[[0, 2]].flatten()), 0)
    graph.model.get_parameter("layer1.0.conv2.weight").data[2, 1, 1, 1] = 1e-30
    assert graph.alive(group).tolist() == [False, True, True, True]
    assert graph.alive(graph.group("layer1.0.conv1")).all()


@pytest.mark.parametrize("places", [[], [-1, 0], [2, 4]])
def test_places_outside_the_group_are_refused(places: list[int]) -> None:
    with pytest.raises(GraphError, match="keep at least one of its 4 channels"):
        graph_of().removed({"conv1": np.array(places, dtype=np.int64)})
