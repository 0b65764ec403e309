from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.graph.labels import End, Labelling
from tersenet.graph.model import ModelGraph
from tersenet.graph.units import build_units
from tersenet.models.preresnet_cifar import preresnet_cifar
from tersenet.models.resnet_cifar import resnet_cifar


def end(role: str, layer: str, labels: list[int]) -> End:
    return End(role, layer, (f"{layer}.weight",), 0, np.array(labels), [])  # pyright: ignore


def test_merged_labels_become_one_unit_at_all_their_places() -> None:
    found = Labelling(
        ends=[end("produce", "a", [1, 2, 3]), end("produce", "b", [4, 5, 6]), end("consume", "c", [1, 2, 3, 4, 5, 6])],
        merges=[(np.array([1, 2, 3]), np.array([6, 5, 4]))],
        count=7,
    )
    units = build_units(found)
    (group,) = units.groups
    assert (group.size, group.producers, group.frozen) == (3, ("a", "b"), None)
    assert [member.places.tolist() for member in group.members] == [
        [[0], [1], [2]],
        [[2], [1], [0]],
        [[0, 5], [1, 4], [2, 3]],
    ]


def test_what_goes_to_other_places_is_another_group() -> None:
    found = Labelling(
        ends=[end("produce", "a", [1, 2, 3, 4]), end("consume", "b", [1, 2]), end("consume", "c", [3, 4])], count=5
    )
    assert [(g.name, g.size) for g in build_units(found).groups] == [("a", 2), ("a#2", 2)]


def test_frozen_units_are_kept_apart_with_the_first_reason() -> None:
    found = Labelling(
        ends=[end("produce", "a", [1, 2, 3])],
        frozen=[(np.array([2]), "first"), (np.array([2, 3]), "second")],
        count=4,
    )
    groups = {g.frozen: g.size for g in build_units(found).groups}
    assert groups == {None: 1, "first": 1, "second": 1}


def test_no_layer_no_group() -> None:
    graph = ModelGraph(nn.Sequential(nn.ReLU()), (torch.zeros(1, 3, 4, 4),))
    assert graph.groups == ()
    assert graph.macs() == 0


@pytest.mark.parametrize("residual", ["coupled", "independent"])
def test_groups_of_a_resnet(residual: str) -> None:
    graph = ModelGraph(resnet_cifar(14, width=4), (torch.zeros(1, 3, 8, 8),), residual)  # pyright: ignore
    free = {g.name: g.size for g in graph.groups if g.frozen is None}
    inner = {f"layer{s}.{b}.conv1": 4 * 2 ** (s - 1) for s in (1, 2, 3) for b in (0, 1)}
    if residual == "independent":
        outer = {f"layer{s}.{b}.conv2": 4 * 2 ** (s - 1) for s in (1, 2, 3) for b in (0, 1)}
        assert free == {"conv1": 4} | inner | outer
        assert all((g.scatter is not None) == (g.name in outer or g.name == "conv1") for g in graph.groups)
    else:
        # Shortcut A pads with zero channels: 4 of stage 1 and 4 of its own in stage 2, and so on.
        assert inner.items() <= free.items()
        assert sum(size for name, size in free.items() if name not in inner) == 16
        assert all(g.scatter is None for g in graph.groups)


def test_the_trunk_of_a_preactivation_network_keeps_its_width() -> None:
    graph = ModelGraph(preresnet_cifar(14, width=4), (torch.zeros(1, 3, 8, 8),), "independent")
    scattered = {g.name for g in graph.groups if g.scatter is not None}
    assert {f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1)} <= scattered
    assert graph.macs({g.name: np.arange(1) for g in graph.groups if not g.frozen}) < graph.macs()
