from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersenet.errors import TersenetError
from tersenet.graph.budget import rate_steps, smallest_rate, uniform_rate
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
