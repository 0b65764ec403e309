from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersenet.errors import TersenetError
from tersenet.graph.budget import (
    Rounding,
    kept_at,
    kept_within,
    rank_globally,
    rank_locally,
    rate_steps,
    smallest_rate,
    uniform_rate,
)
from tersenet.graph.model import Kept, ModelGraph
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.ops.rate_schedule import pruned_count
from tersenet.recipe_target import Target


def test_rates_change_where_a_whole_channel_goes() -> None:
    assert rate_steps([4, 2, 4]) == [0.0, 0.25, 0.5, 0.75]
    assert rate_steps([]) == []


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(-5, 120))
def test_the_smallest_rate_is_what_trying_all_finds(sizes: list[int], limit: int) -> None:
    def cost(rate: float) -> int:
        return sum(size - pruned_count(size, rate) for size in sizes)

    rates = rate_steps(sizes)
    assert smallest_rate(cost, rates, limit) == next((rate for rate in rates if cost(rate) <= limit), None)


def test_it_asks_few_times_and_knows_no_rates() -> None:
    asked: list[float] = []

    def cost(rate: float) -> int:
        asked.append(rate)
        return round(1000 * (1 - rate))

    assert smallest_rate(cost, rate_steps([1000]), 300) == 0.7
    assert len(asked) < 13
    assert smallest_rate(cost, [], 300) is None


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_networks_rate_for_a_target(kind: str) -> None:
    graph = ModelGraph(resnet_cifar(8, width=10), (torch.zeros(1, 3, 8, 8),), "independent")
    groups = [group for group in graph.groups if group.frozen is None]

    def kept(rate: float) -> Kept:
        return {g.name: np.arange(g.size - pruned_count(g.size, rate)) for g in groups}

    count = graph.macs if kind == "macs" else graph.params
    target = Target.parse(f"{kind}=50%")
    rate = uniform_rate(graph, groups, kept, target, count())
    less = max(step for step in rate_steps(g.size for g in groups) if step < rate)
    assert count(kept(rate)) <= 0.5 * count() < count(kept(less))
    with pytest.raises(TersenetError, match=rf"target {kind} <= 1 can't be met: .* at their smallest [\d,]+ are left"):
        uniform_rate(graph, groups, kept, Target.parse(f"{kind}=1"), count())


def test_ranked_locally_every_layer_loses_the_same_share() -> None:
    ranking = rank_locally({"a": np.array([5.0, 1, 3, 2]), "b": np.array([7.0, 7, 7, 9])})
    assert {name: rates.tolist() for name, rates in ranking.items()} == {
        "a": [1, 0.25, 0.75, 0.5],
        "b": [0.25, 0.5, 0.75, 1],
    }
    assert {n: k.tolist() for n, k in kept_at(ranking, 0.5, Rounding()).items()} == {"a": [0, 2], "b": [2, 3]}


def test_ranked_globally_the_weakest_go_wherever_they_are() -> None:
    ranking = rank_globally({"a": np.array([5.0, 1, 3, 2]), "b": np.array([7.0, 8, 0, 9])})
    assert {n: k.tolist() for n, k in kept_at(ranking, 0.5, Rounding()).items()} == {"a": [0], "b": [0, 1, 3]}
    assert rank_globally({}) == {}


@given(st.integers(1, 60), st.floats(0, 0.999))
def test_rates_count_as_in_every_method(size: int, rate: float) -> None:
    kept = kept_at(rank_locally({"a": np.arange(size) * 1.0}), rate, Rounding())["a"]
    assert kept.tolist() == list(range(pruned_count(size, rate), size))


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 16), st.integers(1, 50))
def test_rounding(size: int, wanted: int, multiple: int, at_least: int) -> None:
    left = Rounding(multiple, at_least).left(size, min(wanted, size))
    assert 1 <= left <= size
    assert left == size or (left % multiple == 0 and left >= max(wanted, at_least))


@pytest.mark.parametrize("percent", [75, 50, 30])
def test_of_a_wide_network_99_percent_are_used(percent: int) -> None:
    graph = ModelGraph(resnet_cifar(8, width=32), (torch.zeros(1, 3, 8, 8),))
    ranking = rank_locally({g.name: np.arange(g.size) * 1.0 for g in graph.groups if g.frozen is None})
    kept = kept_within(graph, ranking, Target.parse(f"macs={percent}%"), graph.macs(), Rounding(), {})
    assert 0.99 * percent <= 100 * graph.macs(kept) / graph.macs() <= percent
    # Of every layer, the strongest are left.
    assert all(
        places.tolist() == list(range(len(ranking[n]) - len(places), len(ranking[n]))) for n, places in kept.items()
    )


def test_groups_with_rates_of_their_own_stay() -> None:
    graph = ModelGraph(resnet_cifar(8, width=10), (torch.zeros(1, 3, 8, 8),))
    ranking = rank_locally({g.name: np.arange(g.size) * 1.0 for g in graph.groups if g.frozen is None})
    fixed = {"layer1.0.conv1": np.arange(3)}
    free = {name: rates for name, rates in ranking.items() if name not in fixed}
    kept = kept_within(graph, free, Target.parse("macs=60%"), graph.macs(), Rounding(), fixed)
    assert kept.keys() == free.keys()
    assert graph.macs(fixed | kept) <= 0.6 * graph.macs()
    assert graph.macs(kept) > 0.6 * graph.macs()
