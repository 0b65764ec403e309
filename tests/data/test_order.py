from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersenet.data.order import Order, derived_seed, stratified_split
from tersenet.errors import TersenetError


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    order = Order(torch.arange(100), 32, shuffle=True, seed=3)
    first = torch.cat(order.epoch(5))
    torch.rand(7)
    list(order.epoch(4))
    assert torch.equal(torch.cat(order.epoch(5)), first)
    assert not torch.equal(torch.cat(order.epoch(6)), first)
    assert not torch.equal(torch.cat(Order(torch.arange(100), 32, shuffle=True, seed=4).epoch(5)), first)
    assert torch.equal(first.sort().values, torch.arange(100))


@given(n=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 5), epoch=st.integers(0, 3))
def test_shares(n: int, batch: int, world: int, epoch: int) -> None:
    evaluation = [Order(torch.arange(n), batch, False, 0, rank, world) for rank in range(world)]
    seen = [i for order in evaluation for part in order.epoch(epoch) for i in part.tolist()]
    assert sorted(seen) == list(range(n))
    assert all(len(order.epoch(epoch)) == len(order) for order in evaluation)
    if n < world:
        return
    training = [Order(torch.arange(n), batch, True, 0, rank, world) for rank in range(world)]
    sizes = [[len(part) for part in order.epoch(epoch)] for order in training]
    assert all(size == sizes[0] and len(size) == len(training[0]) for size in sizes)
    seen = [i for order in training for part in order.epoch(epoch) for i in part.tolist()]
    assert len(set(seen)) == len(seen) > n - 2 * world
    # A batch of one sample is only ever all that a rank has.
    assert batch == 1 or 1 not in sizes[0] or sizes[0] == [1]


def test_ranks_batches_are_together_those_of_one_rank() -> None:
    whole = Order(torch.arange(96), 8, shuffle=True, seed=1).epoch(2)
    parts = [Order(torch.arange(96), 2, True, 1, rank, 4).epoch(2) for rank in range(4)]
    for k, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[k] for part in parts]).sort().values, batch.sort().values)


def test_too_few_samples_for_the_ranks() -> None:
    with pytest.raises(TersenetError, match="3 training samples can't be shared among 4 processes"):
        Order(torch.arange(3), 1, shuffle=True, world=4)
    with pytest.raises(TersenetError, match=r"batch_size \(=0\)"):
        Order(torch.arange(3), 0, shuffle=False)


def test_split_is_stratified_disjoint_and_seeded() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    rest, chosen = stratified_split(labels, 0.2, seed=7)
    assert labels[chosen].bincount().tolist() == [10, 6, 4]
    assert torch.equal(torch.cat([rest, chosen]).sort().values, torch.arange(100))
    assert not torch.equal(rest, rest.sort().values)
    again = stratified_split(labels, 0.2, seed=7)
    assert torch.equal(again[0], rest)
    assert torch.equal(again[1], chosen)
    assert not torch.equal(stratified_split(labels, 0.2, seed=8)[1], chosen)


def test_split_never_changes() -> None:
    # Written down: a split that moved with an upgrade would put test images into training.
    assert stratified_split(torch.arange(10) % 2, 4, seed=0)[1].tolist() == [0, 3, 5, 6]


@pytest.mark.parametrize(("part", "count"), [(0, 0), (0.0, 0), (0.001, 1), (0.25, 25), (7, 7), (99, 99)])
def test_split_sizes(part: float, count: int) -> None:
    rest, chosen = stratified_split(torch.arange(100) % 10, part, seed=0)
    assert (len(rest), len(chosen)) == (100 - count, count)


@pytest.mark.parametrize("part", [100, 5000, 0.999])
def test_a_split_leaves_something(part: float) -> None:
    with pytest.raises(TersenetError, match="leave some to train on"):
        stratified_split(torch.zeros(100, dtype=torch.int64), part, seed=0)


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = [derived_seed(seed, epoch) for seed in range(-5, 20) for epoch in range(20)]
    # torch's CPU generator takes the low 32 bits.
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
