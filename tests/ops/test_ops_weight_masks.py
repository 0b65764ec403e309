"""Masks of weights: facts S6, S7 and the tables of S13, patterns, scopes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.ops.cook_toom import cook_toom
from tersenet.ops.weight_masks import (
    BLOCKS,
    Pattern,
    Scope,
    block_scores,
    from_blocks,
    kept_count,
    masks,
    tap_importance,
    to_blocks,
    two_of_four,
)


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def one(values: Tensor, density: float, pattern: Pattern = "unstructured", before: Tensor | None = None) -> Tensor:
    whole = torch.ones_like(values, dtype=torch.bool)
    return masks({"a": values}, {"a": whole if before is None else before}, {"a": density}, pattern, "layer")["a"]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.just(16), st.integers(1, 6), st.integers(1, 9)),
    density=st.floats(1e-6, 1),
    seed=st.integers(0, 9),
)
def test_fact_s6_int_of_size_times_density_are_kept_the_largest(
    shape: tuple[int, int, int], density: float, seed: int
) -> None:
    values = scores(*shape, seed=seed)
    mask = one(values, density)
    count = int(mask.sum())
    exact = values.numel() * density
    assert count == max(1, int(exact)) or count == pytest.approx(exact, abs=1e-6)
    assert count < values.numel() or density == pytest.approx(1)
    if count < values.numel():
        assert values[mask].min() >= values[~mask].max()


@pytest.mark.parametrize(("size", "density", "count"), [(100, 0.29, 29), (10, 0.7, 7), (16, 0.01, 1), (48, 1.0, 48)])
def test_counts(size: int, density: float, count: int) -> None:
    assert kept_count(size, density) == count


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(TersenetError, match=r"must be above 0 and at most 1"):
        kept_count(100, density)


@pytest.mark.parametrize("pattern", ["unstructured", "16x1", "4x1"])
@pytest.mark.parametrize("outputs", [5, 16, 33])
def test_fact_s7_masks_are_nested(pattern: Pattern, outputs: int) -> None:
    values = scores(16, 3, outputs)
    before = torch.ones_like(values, dtype=torch.bool)
    for step, density in enumerate((0.7, 0.4, 0.2, 0.1, 0.001)):
        # Other scores each time, as after training.
        mask = one(scores(16, 3, outputs, seed=step), density, pattern, before)
        assert not (mask & ~before).any()
        assert 0 < mask.sum() < before.sum()
        before = mask
    # Nothing comes back.
    assert torch.equal(one(values, 0.5, pattern, before), before)


def test_what_is_pruned_stays_so_however_large_it_is() -> None:
    values = scores(16, 2, 4)
    before = values < 0.5
    assert not (one(values, 0.2, before=before) & ~before).any()


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("outputs", [3, 16, 37])
def test_blocks(block: int, outputs: int) -> None:
    values = scores(4, 3, outputs)
    found = block_scores(values, block)
    assert found.shape == (4, 3, -(-outputs // block))
    for number in range(found.shape[2]):
        expected = values[..., block * number : block * number + block].mean(2)
        torch.testing.assert_close(found[..., number], expected)
    kept = found > 0.5
    mask = from_blocks(kept, block, outputs)
    assert mask.shape == values.shape
    back = to_blocks(mask, block)
    assert back is not None
    assert torch.equal(back, kept)
    mask[0, 0, 0] = ~mask[0, 0, 0]
    assert (to_blocks(mask, block) is None) == (min(block, outputs) > 1)


@pytest.mark.parametrize("pattern", ["16x1", "4x1"])
def test_block_masks_are_blocks_of_output_channels(pattern: Pattern) -> None:
    values = scores(16, 5, 32)
    mask = one(values, 0.25, pattern)
    blocks = to_blocks(mask, BLOCKS[pattern])
    assert blocks is not None
    assert int(blocks.sum()) == blocks.numel() // 4
    assert mask.double().mean() == 0.25
    means = block_scores(values, BLOCKS[pattern])
    assert means[blocks].min() >= means[~blocks].max()


@pytest.mark.parametrize("inputs", [3, 4, 8, 10, 5])
def test_two_of_four_input_channels(inputs: int) -> None:
    values = scores(16, inputs, 6)
    mask = two_of_four(values)
    for start in range(0, inputs, 4):
        group, kept = values[:, start : start + 4], mask[:, start : start + 4]
        assert (kept.sum(1) == min(2, group.shape[1])).all()
        assert (group.masked_fill(~kept, 9).amin(1) >= group.masked_fill(kept, 0).amax(1)).all()
    assert torch.equal(one(values, 0.5, "2:4"), mask)


@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_one_threshold_for_all_layers(scope: Scope) -> None:
    values = {"small": scores(16, 2, 3) / 100, "large": scores(16, 4, 4, seed=1), "tiny": scores(16, 1, 1) / 1e6}
    before = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
    found = masks(values, before, dict.fromkeys(values, 0.25), "unstructured", scope)
    counts = {name: int(mask.sum()) for name, mask in found.items()}
    assert sum(counts.values()) == sum(value.numel() // 4 for value in values.values())
    assert min(counts.values()) >= 1
    if scope == "global":
        assert counts["small"] == counts["tiny"] == 1
        best = values["large"].flatten().topk(counts["large"]).values.min()
        assert values["large"][found["large"]].min() == best
    else:
        assert counts["small"] > 1
    again = masks(values, found, dict.fromkeys(values, 0.1), "unstructured", scope)
    assert all(not (again[name] & ~found[name]).any() for name in values)


@pytest.mark.parametrize(("m", "smallest", "largest", "ratio"), [(2, 2.0, 4.0, 2.0), (4, 42.0, 850.0, 850 / 42)])
def test_fact_s13_the_published_tables(m: int, smallest: float, largest: float, ratio: float) -> None:
    exact = cook_toom(m, 3, "reference")
    at, bt = (torch.tensor([[float(x) for x in row] for row in matrix]) for matrix in (exact.at, exact.bt))
    table = tap_importance(at, bt).view(exact.t, exact.t)
    assert torch.allclose(table, table.t())
    if m == 2:
        row = torch.tensor([2, 8**0.5, 8**0.5, 2])
        torch.testing.assert_close(table[0], row)
        torch.testing.assert_close(table[1], row * 2**0.5)
    assert float(table.min()) == pytest.approx(smallest, rel=0.01)
    assert float(table.max()) == pytest.approx(largest, rel=0.01)
    assert float(table[0, 0]) == pytest.approx(smallest, rel=0.01)
    assert float(table.max() / table[0, 0]) == pytest.approx(ratio, rel=0.02)
