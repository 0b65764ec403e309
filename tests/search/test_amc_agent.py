"""The agent and its wall, without any network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import truncnorm

from tersenet.errors import TersenetError
from tersenet.graph.budget import Rounding
from tersenet.search.amc_agent import Agent, truncated_normal
from tersenet.search.amc_environment import STATES, States, Wall


@dataclass(frozen=True)
class Sized:
    name: str
    size: int


class Chain:
    """What a chain of layers costs: each reads what the one before makes, and some make what others do (`tied`)."""

    def __init__(self, sizes: list[int], weights: list[int], tied: bool) -> None:
        self.items = [Sized(str(place), size) for place, size in enumerate(sizes)]
        self.weights, self.tied = weights, tied

    def __call__(self, left: NDArray[np.int64]) -> int:
        widths = [3, *(int(n) for n in left), 10]
        total = sum(w * a * b for w, a, b in zip(self.weights, widths[:-1], widths[1:], strict=False))
        return total + int(left[0] * left[-1] * self.tied)


CHAINS = st.integers(1, 6).flatmap(
    lambda n: st.builds(
        Chain,
        st.lists(st.integers(1, 70), min_size=n, max_size=n),
        st.lists(st.integers(1, 900), min_size=n + 1, max_size=n + 1),
        st.booleans(),
    )
)


@settings(deadline=None, max_examples=200)
@given(
    costs=CHAINS,
    budget=st.floats(0.05, 1.0),
    lowest=st.floats(0.01, 0.5),
    multiple=st.sampled_from([1, 2, 8]),
    actions=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    centred=st.booleans(),
)
def test_fact_20_random_actions_never_exceed_the_budget_and_leave_little_of_it(
    costs: Chain, budget: float, lowest: float, multiple: int, actions: list[float], centred: bool
) -> None:
    sizes = [item.size for item in costs.items]
    limit = int(budget * costs(np.array(sizes)))
    rounding = Rounding(multiple)
    try:
        wall = Wall(costs, limit, rounding, lowest)
    except TersenetError:
        # Only where even the lowest of everything is too much.
        fewest = [rounding.left(size, max(1, int(np.ceil(lowest * size - 1e-9)))) for size in sizes]
        assert costs(np.array(fewest)) > limit
        return
    if centred:
        wall.centre_on([max(1, round(action * size)) for action, size in zip(actions[::-1], sizes, strict=False)])
    counts = wall.walk(lambda decided: wall.share(actions[len(decided)], len(decided)))
    assert costs(np.array(counts)) <= limit
    for count, size in zip(counts, sizes, strict=True):
        assert count == size or count % multiple == 0
        assert lowest * size - 1e-6 <= count <= size
    # What is left over is less than one step of the last layer that could have one.
    more = [
        costs(np.array([*counts[:place], rounding.left(size, counts[place] + 1), *counts[place + 1 :]]))
        for place, size in enumerate(sizes)
        if counts[place] < size
    ]
    assert not more or more[-1] > limit


def test_without_a_budget_every_action_counts() -> None:
    wall = Wall(Chain([10, 20], [1, 1, 1], tied=False), None, Rounding(), 0.2)
    assert wall.bounds([]) == (2, 10)
    assert wall.walk(lambda decided: (0.0, 0.55)[len(decided)]) == [2, 11]


def test_half_an_action_is_the_even_share() -> None:
    costs = Chain([50, 80, 60], [7, 3, 2, 5], tied=True)
    whole = costs(np.array([50, 80, 60]))
    wall = Wall(costs, whole // 2, Rounding(), 0.2)
    counts = np.array([round(share * size) for share, size in zip(wall.centres, wall.sizes, strict=True)])
    assert 0.97 < costs(counts) / (whole // 2) <= 1
    assert len(set(wall.centres)) == 1
    for _ in range(2):
        assert [wall.share(action, 1) for action in (0.0, 0.5, 1.0)] == [0.2, wall.centres[1], 1.0]
        for action in (0.0, 0.1, 0.5, 0.8, 1.0):
            count = round(wall.share(action, 1) * 80)
            assert wall.action([10, count]) == pytest.approx(action, abs=0.03)
        wall.centre_on([25, 48, 60])
    assert wall.centres == [0.5, 0.6, 1.0]
    assert (wall.share(0.7, 2), wall.action([10, 48, 60])) == (1.0, 0.5)


def test_a_budget_out_of_reach_says_the_floor() -> None:
    with pytest.raises(TersenetError, match=r"a budget of 10 MACs can't be met: with 20% of every layer 70 are left"):
        Wall(Chain([10, 20], [5, 5, 0], tied=False), 10, Rounding(), 0.2)


def test_states_say_where_the_search_is() -> None:
    costs = Chain([10, 20, 5], [1, 1, 1, 1], tied=False)
    numbers = np.random.default_rng(0).random((3, 7)) * 50
    wall = Wall(costs, None, Rounding(), 0.2)
    states = States(numbers, wall)
    rows = torch.stack([states.before(decided) for decided in ([], [5], [5, 20])])
    assert rows.shape == (3, STATES)
    assert bool(((rows >= 0) & (rows <= 1)).all())
    assert rows[:, :7].amax(0).tolist() == [1] * 7
    assert rows[:, :7].amin(0).tolist() == [0] * 7
    whole = 3 * 10 + 10 * 20 + 20 * 5 + 5 * 10
    assert rows[:, 7].tolist() == pytest.approx([0, (3 * 5 + 20 * 5) / whole, (3 * 5 + 20 * 5) / whole])
    assert rows[:, 8].tolist() == pytest.approx([1 - 3 * 10 / whole, 1 - (30 + 200) / whole, 0], abs=1e-6)
    assert rows[:, 9].tolist() == pytest.approx([0.5, 0.5 * (0.5 - 0.2) / 0.4, 1])


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 0.5), (0.02, 0.2), (0.97, 0.05), (0.3, 1e-9)])
def test_noise_is_a_normal_distribution_cut_off(mean: float, deviation: float) -> None:
    oracle = truncnorm(-mean / deviation, (1 - mean) / deviation, mean, deviation)
    for drawn in (0.0, 0.001, 0.3, 0.5, 0.9, 0.999):
        found = truncated_normal(mean, deviation, drawn)
        assert 0 <= found <= 1
        assert found == pytest.approx(float(oracle.ppf(drawn)), abs=1e-6)


def rewarded(agent: Agent, episodes: int) -> list[float]:
    """Two layers, of which the first should keep a fifth of its channels and the second four fifths."""
    states = torch.eye(2, STATES)
    found: list[float] = []
    for episode in range(episodes):
        actions = [agent.act(state, episode, step) for step, state in enumerate(states)]
        found.append(1 - (actions[0] - 0.2) ** 2 - (actions[1] - 0.8) ** 2)
        agent.learn(states, actions, found[-1], episode)
    return found


def test_it_learns_what_is_rewarded() -> None:
    found = rewarded(Agent(STATES, 10, seed=0), 90)
    assert sum(found[:10]) / 10 < 0.75
    # A half for both, where it begins, is worth 0.82.
    assert sum(found[-20:]) / 20 > 0.9


def test_it_is_a_function_of_its_seed_and_what_it_was_shown() -> None:
    torch.manual_seed(1)
    first = rewarded(Agent(STATES, 5, seed=3), 12)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    agent = Agent(STATES, 5, seed=3)
    assert rewarded(agent, 12) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert rewarded(Agent(STATES, 5, seed=4), 12) != first


def test_nothing_is_learnt_while_it_warms_up() -> None:
    agent = Agent(STATES, 10, seed=0)
    weights = [agent.actor.get_parameter("0.weight"), agent.critic.state.weight, agent.critic.out.weight]
    before = [weight.detach().clone() for weight in weights]
    rewarded(agent, 10)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    agent.learn(torch.eye(2, STATES), [0.1, 0.2], 1.0, 10)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
