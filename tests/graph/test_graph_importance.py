"""Scores of the units of channel groups, each against a plain loop over a small network's layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import ConvBN, MobileNetV2, conv, randomise
from tersenet.errors import GraphError
from tersenet.graph.importance import (
    activation_scores,
    batch_norm_scales,
    filter_scores,
    random_scores,
    taylor_scores,
    unit_scores,
)
from tersenet.graph.model import ModelGraph
from tersenet.ops.importance import FILTER_SCORES, activation, apoz


class Branches(nn.Module):
    """A trunk with two producers, a grouped layer behind it, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = ConvBN(3, 8, act=False), ConvBN(3, 8, 1, act=False)
        self.grouped = conv(8, 6, groups=2, bias=True)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x) + self.side(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def graph_of() -> ModelGraph:
    torch.manual_seed(0)
    return ModelGraph(randomise(Branches()), (torch.zeros(2, 3, 6, 6),))


def images() -> list[Tensor]:
    return list(torch.randn(3, 4, 3, 6, 6, generator=torch.Generator().manual_seed(1)))


def losses(model: nn.Module) -> Iterator[Tensor]:
    return (model(x).square().sum() for x in images())


@pytest.mark.parametrize("name", FILTER_SCORES)
def test_a_unit_is_the_norm_over_its_filters(name: str) -> None:
    graph, score = graph_of(), FILTER_SCORES[name]
    model = graph.model
    trunk = graph.group("stem.0")
    found = unit_scores(trunk, filter_scores(graph, [trunk], score))
    stem, side = (score(model.get_parameter(f"{n}.0.weight").detach().flatten(1)) for n in ("stem", "side"))
    # The grouped layer reads channels 0 to 3 and 4 to 7 in its two groups: i and i + 4 go together.
    assert trunk.size == 4
    for i in range(4):
        expected = sum(float(s[j]) ** 2 for s in (stem, side) for j in (i, i + 4)) ** 0.5
        assert float(found[i]) == pytest.approx(expected)


def test_permuted_filters_permute_scores() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 7), nn.BatchNorm2d(7), nn.ReLU(), conv(7, 2))
    order = torch.tensor([4, 2, 0, 6, 1, 5, 3])

    def scores() -> Tensor:
        graph = ModelGraph(model, (torch.zeros(1, 3, 5, 5),))
        return unit_scores(graph.group("0"), filter_scores(graph, graph.groups, FILTER_SCORES["l1"]))

    before = scores()
    model.get_parameter("0.weight").data.copy_(model.get_parameter("0.weight").data[order])
    assert torch.equal(scores(), before[order])


def test_batch_norm_scales() -> None:
    graph = graph_of()
    trunk = graph.group("stem.0")
    found = unit_scores(trunk, batch_norm_scales(graph, [trunk]))
    gammas = [graph.model.get_parameter(f"{name}.1.weight").tolist() for name in ("stem", "side")]
    for i in range(4):
        assert float(found[i]) == pytest.approx(sum(g[j] ** 2 for g in gammas for j in (i, i + 4)) ** 0.5)
    with pytest.raises(GraphError, match="bn_scale needs a batch norm behind grouped, which has none; use l2"):
        batch_norm_scales(graph, graph.groups)


def test_taylor_is_the_mean_over_batches_and_leaves_no_trace() -> None:
    graph = graph_of()
    weight = graph.model.get_parameter("side.0.weight")
    weight.requires_grad_(False)
    graph.model.train()
    trunk = graph.group("stem.0")
    found = unit_scores(trunk, taylor_scores(graph, [trunk], losses(graph.model)))
    assert not weight.requires_grad
    assert all(p.grad is None for p in graph.model.parameters())
    assert graph.model.training
    weight.requires_grad_(True)
    graph.model.eval()
    total = {name: torch.zeros(8) for name in ("stem", "side")}
    for loss in losses(graph.model):
        graph.model.zero_grad()
        loss.backward()
        for name, sums in total.items():
            weight = graph.model.get_parameter(f"{name}.0.weight")
            assert weight.grad is not None
            sums += (weight * weight.grad).detach().abs().flatten(1).sum(1) / 3
    expected = [sum(float(s[j]) ** 2 for s in total.values() for j in (i, i + 4)) ** 0.5 for i in range(4)]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("statistic", [activation, apoz])
def test_activations_are_those_that_the_next_layer_reads(statistic: object) -> None:
    graph = graph_of()
    model = graph.model
    ends = activation_scores(graph, graph.groups, losses(model), statistic)  # pyright: ignore
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        x = torch.cat(images())
        trunk = F.relu(model.stem(x) + model.side(x))  # pyright: ignore
        flat = F.adaptive_avg_pool2d(F.relu(model.grouped(trunk)), 2).flatten(1)  # pyright: ignore

    def plain(values: Tensor) -> float:
        return float(values.abs().mean() if statistic is activation else values.ne(0).float().mean())

    found = unit_scores(graph.group("stem.0"), ends).tolist()
    assert found == pytest.approx([plain(trunk[:, [i, i + 4]]) for i in range(4)])
    # A channel of the grouped layer lies at four places of the flattened image, and units go in pairs there too.
    units = unit_scores(graph.group("grouped"), ends).tolist()
    places = [[4 * channel + k for channel in (i, i + 3) for k in range(4)] for i in range(3)]
    assert units == pytest.approx([sum(plain(flat[:, p]) ** 2 for p in own) ** 0.5 for own in places])


def test_random_scores_follow_the_seed() -> None:
    graph = graph_of()
    first, again, other = (random_scores(graph, graph.groups, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[end], again[end]) for end in first)
    assert not any(torch.equal(first[end], other[end]) for end in first)


def test_every_group_of_an_inverted_residual_network_has_scores() -> None:
    torch.manual_seed(0)
    graph = ModelGraph(randomise(MobileNetV2()), (torch.zeros(2, 3, 8, 8),))
    groups = [group for group in graph.groups if group.frozen is None]
    batches = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    for ends in (
        batch_norm_scales(graph, groups),
        taylor_scores(graph, groups, (graph.model(x).square().sum() for x in batches)),
        activation_scores(graph, groups, (graph.model(x).sum() for x in batches), activation),
    ):
        assert all(unit_scores(group, ends).shape == (group.size,) for group in groups)


def test_scores_that_are_not_finite_name_the_layers() -> None:
    graph = graph_of()
    graph.model.get_parameter("side.0.weight").data[2, 0, 0, 0] = float("nan")
    trunk = graph.group("stem.0")
    with pytest.raises(GraphError, match=r"stem.0: the scores of its channels are not finite .* stem.0, side.0"):
        unit_scores(trunk, filter_scores(graph, [trunk], FILTER_SCORES["l2"]))


def test_a_group_of_which_nothing_was_seen() -> None:
    graph = graph_of()
    with pytest.raises(GraphError, match="nothing was seen of its channels"):
        unit_scores(graph.group("stem.0"), {})
