from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.errors import GraphError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import check_patterns, left_whole, matches, named_rates, select_groups
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
    with pytest.raises(
        GraphError, match=r"no layer is left to prune \(include, exclude, or frozen: linear: the network"
    ):
        names(graph, ("*",), ("*",))


def test_of_a_tied_group_all_layers_must_be_included() -> None:
    graph = graph_of("coupled")
    assert graph.group("conv1").producers[:2] == ("conv1", "layer1.0.conv2")
    assert "conv1" in names(graph)
    assert "conv1" not in names(graph, ("*",), ("layer1.0.conv2",))
    assert "conv1" not in names(graph, ("conv1", "layer1.0.conv1"))


def test_by_type() -> None:
    model = nn.Sequential(
        *[nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU()],
        *[nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 3), nn.ReLU(), nn.Flatten()],
        *[nn.Linear(256, 6), nn.ReLU(), nn.Linear(6, 2)],
    )
    graph = ModelGraph(model, (torch.zeros(1, 3, 8, 8),))
    kinds = {"conv": "0", "grouped": "2", "depthwise": "2", "transposed": "5", "linear": "8"}
    assert names(graph) == ["0", "2", "5", "8"]
    for kind, layer in kinds.items():
        assert names(graph, (f"type:{kind}",)) == [layer]
        assert layer not in names(graph, ("*",), (f"type:{kind}",))
    # A depthwise layer's name stands for the layer whose channels it filters.
    assert names(graph, ("*",), ("4",)) == ["0", "5", "8"]
    assert names(graph, ("position:first", "position:last")) == ["0", "8"]
    with pytest.raises(
        UnknownNameError, match=r"unknown kind of layer 'type:depthwize'; did you mean 'type:depthwise'"
    ):
        names(graph, ("*",), ("type:depthwize",))


def test_rates_by_pattern_the_first_match_counts() -> None:
    graph = graph_of()
    groups = select_groups(graph, ("*",), ("conv1",))
    found = named_rates(graph, groups, {"layer2.0.conv1": 0.1, "layer2*": 0.2, "position:last": 0.3})
    assert found == {"layer2.0.conv1": 0.1, "layer2.0.conv2": 0.2, "layer3.0.conv2": 0.3}
    with pytest.raises(UnknownNameError, match="unknown layer 'conv1'"):
        named_rates(graph, groups, {"conv1": 0.1})


def test_what_is_left_whole_and_why() -> None:
    graph = graph_of("coupled")
    chosen = select_groups(graph, ("*",), ("layer1.0.conv2",))
    reasons = left_whole(graph, chosen)
    assert {name for names in reasons.values() for name in names} == {g.name for g in graph.groups} - {
        g.name for g in chosen
    }
    assert any("conv1" in names and "tied" in reason for reason, names in reasons.items())
    assert any("linear" in names and "the network's output" in reason for reason, names in reasons.items())


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
