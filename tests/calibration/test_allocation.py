"""Budgets shared out by curves: fact 19 for any costs and curves, and the best of all rows where there are few."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tersenet.calibration.allocation import Curves, allocate, uniform_within
from tersenet.errors import TersenetError
from tersenet.graph.budget import USED_UP, Rounding
from tersenet.recipe_target import Target


@dataclass(frozen=True)
class Sized:
    name: str
    size: int


class Network:
    """What layers cost that each read what the one before makes (`chain`), or that cost by themselves, like ranks; and
    what does not depend on them."""

    way_out = "Ask for less"

    def __init__(self, sizes: list[int], weights: list[int], rest: int, chain: bool) -> None:
        self.items = [Sized(str(place), size) for place, size in enumerate(sizes)]
        self.weights, self.rest, self.chain = weights, rest, chain

    def __call__(self, left: NDArray[np.int64]) -> int:
        widths = [3, *(int(n) for n in left)] if self.chain else [1] * (len(left) + 1)
        made = zip(self.weights, widths, left, strict=False)
        return self.rest + sum(weight * read * int(width) for weight, read, width in made)

    @property
    def whole(self) -> NDArray[np.int64]:
        return np.array([item.size for item in self.items])


class Timed(Network):
    """Layers of measured times, which rise by jumps and stay the same between them."""

    def __call__(self, left: NDArray[np.int64]) -> int:
        taken = 0
        for item, weight, width in zip(self.items, self.weights, left, strict=True):
            random = np.random.default_rng(weight)
            jumps = random.integers(1, 100, item.size) * (random.random(item.size) < 0.3)
            taken += int(jumps[: int(width)].sum())
        return 1 + self.rest + taken


def networks(most: int, chain: st.SearchStrategy[bool], kind: type[Network] = Network) -> st.SearchStrategy[Network]:
    return st.integers(1, 4).flatmap(
        lambda n: st.builds(
            kind,
            st.lists(st.integers(1, most), min_size=n, max_size=n),
            st.lists(st.integers(1, 500), min_size=n, max_size=n),
            st.integers(0, 5000),
            chain,
        )
    )


def curves_of(network: Network, seed: int, convex: bool) -> Curves:
    """Falling to 0, by steps of any size, or of ones that fall as well."""
    random = np.random.default_rng(seed)
    found: Curves = {}
    for item in network.items:
        steps = random.exponential(size=item.size) ** 3
        steps = np.sort(steps) if convex else steps
        found[item.name] = np.concatenate([[0.0], np.cumsum(steps)])[::-1].copy()
    return found


@settings(deadline=None, max_examples=150)
@given(
    network=networks(150, st.booleans()) | networks(150, st.just(value=False), Timed),
    budget=st.floats(0.02, 1.0),
    rounding=st.builds(Rounding, st.sampled_from([1, 2, 8]), st.integers(1, 9)),
    seed=st.integers(0, 99),
    fixed=st.booleans(),
    measured=st.booleans(),
)
def test_fact_19_a_budget_is_never_exceeded_and_used_up(
    network: Network, budget: float, rounding: Rounding, seed: int, fixed: bool, measured: bool
) -> None:
    whole, curves = network(network.whole), curves_of(network, seed, convex=False)
    given_: dict[str, int] = {}
    if fixed:
        name = network.items[-1].name
        given_[name] = (network.items[-1].size + 1) // 2
        del curves[name]
    limit = int(budget * whole)
    target = Target("macs", float(limit), relative=False)
    fewest = [given_.get(i.name, rounding.left(i.size, 1)) for i in network.items]
    if limit < 1 or network(np.array(fewest)) > limit:
        with pytest.raises(TersenetError, match=f"at their smallest {network(np.array(fewest)):,} .*Ask for less"):
            allocate(network, curves, target, whole, rounding, given_)
        return
    if measured:
        counts = allocate(network, curves, target, whole, rounding, given_)
    else:
        counts = uniform_within(network, target, whole, rounding, given_)
    left = np.array([counts[item.name] for item in network.items])
    assert network(left) <= limit
    for item, count in zip(network.items, left, strict=True):
        if item.name in given_:
            assert count == given_[item.name]
        else:
            assert count == item.size or (count % rounding.multiple == 0 and count >= rounding.at_least)
    if network(left) < min(USED_UP, 0.99) * limit:
        for place, item in enumerate(network.items):
            more = left.copy()
            more[place] = rounding.left(item.size, int(left[place]) + 1)
            assert item.name in given_ or left[place] == item.size or network(more) > limit


@settings(deadline=None, max_examples=100)
@given(network=networks(7, st.just(value=False)), budget=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_falling_steps_are_shared_out_as_well_as_can_be(network: Network, budget: float, seed: int) -> None:
    """At least as well as any row that leaves room for one more step of the dearest layer.

    A step is below 1 % of the budget, so that using it up never goes before the error.
    """
    network.rest = 100 * max(network.weights)
    curves, whole, least = curves_of(network, seed, convex=True), network(network.whole), network(network.whole * 0 + 1)
    limit = least + int(budget * (whole - least))

    def error(row: tuple[int, ...]) -> float:
        return sum(float(curves[item.name][count]) for item, count in zip(network.items, row, strict=True))

    counts = allocate(network, curves, Target("macs", float(limit), relative=False), whole, Rounding(), {})
    found = error(tuple(counts[item.name] for item in network.items))
    rows = product(*(range(1, item.size + 1) for item in network.items))
    rivals = [error(row) for row in rows if network(np.array(row)) <= limit - max(network.weights)]
    assert found <= min(rivals, default=found) + 1e-9 * found


def test_what_costs_the_same_goes_where_it_hurts_least() -> None:
    network = Network([10, 10], [5, 5], 0, chain=False)
    curves = {"0": np.linspace(1, 0, 11), "1": np.linspace(1, 0, 11) * 3}
    target = Target("macs", 60.0, relative=False)
    assert allocate(network, curves, target, 100, Rounding(), {}) == {"0": 2, "1": 10}
    assert uniform_within(network, target, 100, Rounding(), {}) == {"0": 6, "1": 6}


def test_steps_that_save_nothing_lead_to_those_that_do() -> None:
    """A layer timed by fours, which costs nearly nothing in error, gives way before one that costs much."""

    class ByFours(Network):
        def __call__(self, left: NDArray[np.int64]) -> int:
            return 100 * (-(-int(left[0]) // 4) + int(left[1]))

    network = ByFours([16, 16], [1, 1], 0, chain=False)
    curves = {"0": 1e-3 * np.arange(16, -1.0, -1.0), "1": np.arange(16, -1.0, -1.0)}
    counts = allocate(network, curves, Target("macs", 1700.0, relative=False), 2000, Rounding(), {})
    assert counts == {"0": 4, "1": 16}
