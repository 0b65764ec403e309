"""Targets of a later step: from the network before the first one, found through the edits in between."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sfp_support import CLASSES, CPU, SHAPE, Batches, tiny_data
from torch import nn

import tersenet as tn
from graph_support import randomise
from tersenet.calibration.images import Images
from tersenet.calibration.original import Followed, Original
from tersenet.calibration.readers import find_readers
from tersenet.calibration.sampling import Targets
from tersenet.graph.edits import Adapt, Fold, Group, Keep, Merge, Slice, Split
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import attach
from tersenet.methods.base import Context, Method
from tersenet.methods.channel_decomposition import ChannelDecomposition
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.spatial_decomposition import SpatialDecomposition
from tersenet.models.resnet_cifar import resnet_cifar

EXAMPLE = (torch.zeros(2, *SHAPE),)
STEPS: tuple[Method, ...] = (
    SpatialDecomposition(rate=0.4, relu=False),
    ChannelDecomposition(rate=0.1, include=("layer1.*", "layer2.*"), relu=False),
    ChannelPruning(rate=0.25, images=96),
)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise(resnet_cifar(8, width=10, classes=CLASSES))


def carried_out(steps: tuple[Method, ...], original: bool) -> nn.Module:
    model = resnet()
    before = ModelGraph(copy.deepcopy(model), EXAMPLE)
    attach(before.model, before.record)
    for step in steps:
        graph = ModelGraph(model, EXAMPLE)
        data = dataclasses.replace(tiny_data(), train=Batches(96, 32, 1))
        context = Context(CPU, 0, None, graph.macs(), graph.params(), data)
        if original:
            context.original = lambda: before.model
        step.apply(graph, context)
    return model


@cache
def three_steps(original: bool) -> nn.Module:
    return carried_out(STEPS, original)


def output_error(model: nn.Module) -> float:
    x = Batches(64, 32, 5).x
    with torch.no_grad():
        whole = resnet()(x)
        return float((model(x) - whole).norm() / (whole - whole.mean(0)).norm())


def test_three_steps_lose_less_when_all_are_fitted_to_the_first_ones_network() -> None:
    errors = [output_error(three_steps(original)) for original in (True, False)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.method)
def test_a_first_step_is_the_same_to_the_bit(step: Method) -> None:
    states = [carried_out((step,), original).state_dict() for original in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_every_layer_is_followed_to_its_rows() -> None:
    """Of a network that was split and pruned without any loss of its own, targets are those of the original."""
    model = three_steps(True)
    graph = ModelGraph(model, EXAMPLE)
    original = Original(ModelGraph(resnet(), EXAMPLE), graph.record.edits)
    readers, _ = find_readers(graph)
    images = Images(Batches(32, 32, 1), 32, 8, 0, CPU)
    found = {reader.layer: original.counterpart(graph, reader) for reader in readers}
    assert all(each is None for name, each in found.items() if name.startswith("layer2.0.conv1.0"))
    last = next(name for name in found if name.startswith("layer2.0.conv1") and found[name] is not None)
    there, kept = found[last] or (None, None)
    assert there is not None
    assert there.layer == "layer2.0.conv1"
    assert kept is not None
    assert len(kept) == len(model.get_parameter(f"{last}.weight")) < 20
    assert sum(each is not None for each in found.values()) == len(original._readers)  # pyright: ignore[reportPrivateUsage]
    targets = Targets(graph, readers, images, original)
    uses = {reader.layer: reader.uses[0] for reader in readers}
    assert targets.load(0, uses[last])[0].shape[1] == len(kept)
    (x,) = next(images.batches())
    with torch.no_grad():
        wanted = resnet()(x)
    rows, _ = targets.load(0, uses["linear"])
    torch.testing.assert_close(rows[rows[:, 0].argsort()], wanted[wanted[:, 0].argsort()])


def keep(layer: str, *places: int) -> Keep:
    return Keep(group=layer, slices=(Slice(tensors=(f"{layer}.weight",), axis=0, keep=places),))


def test_edits_are_followed() -> None:
    followed = Followed()
    for edit in (
        keep("a", 0, 2, 5, 6),
        Split(module="a", form="spatial", rank=2),
        Split(module="a.1", form="channel", rank=2),
        keep("a.1.1", 1, 3),
        Adapt(module="b", gather=(0, 1)),
        Fold(module="c", norm="d"),
        Merge(first="e", second="f"),
    ):
        followed.take(edit)
    assert followed.origin["a.1.1"] == "a"
    assert followed.kept["a.1.1"].tolist() == [2, 6]
    assert followed.origin["b.inner"] == "b"
    assert followed.origin["e"] == "f"
    assert [followed.origin[name] for name in ("a", "a.0", "a.1", "a.1.0", "b", "f")] == [None] * 6
    assert not followed.lost
    followed.take(Group(module="g", groups=2, rows=tuple(range(4)), columns=tuple(range(4))))
    assert followed.lost


def test_a_run_gives_later_steps_the_network_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = Original.of

    def looked(graph: ModelGraph, context: Context) -> Original | None:
        seen.append(real(graph, context))
        return seen[-1]

    monkeypatch.setattr(Original, "of", looked)
    fit = {"method": "train", "fit": {"epochs": 1}}
    step = {"method": "channel_pruning", "rate": 0.1, "images": 16, "positions": 4}
    narrow = {"model_arguments.width": 4}
    tn.compress("resnet8", {"steps": [fit, step, step, fit, step]}, data="digits", overrides=narrow)
    assert [original is None for original in seen] == [True, False, True]
    assert np.isfinite(seen[1].graph.macs())
