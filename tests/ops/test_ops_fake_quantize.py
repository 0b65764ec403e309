"""Ranges, scales, rounding, and the gradients through them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet.ops.fake_quantize import (
    Rounding,
    batch_range,
    empty_range,
    fake_quantize,
    joined_range,
    learned_scale,
    moving_range,
    round_to,
    scale_of,
)

EIGHT = Rounding(8, (1,))


def test_the_reference_quantizer() -> None:
    """W5: fresh observer, moving range, straight-through gradient."""
    values = torch.tensor([-1.0, 0.5, 0.25], requires_grad=True)
    first = moving_range(empty_range((1,)), batch_range(values.detach(), (1,)), 0.01)
    assert first.flatten().tolist() == [-1, 0.5]
    assert scale_of(first, EIGHT).item() == pytest.approx(1 / 127.5)
    y = fake_quantize(values, scale_of(first, EIGHT), EIGHT)
    torch.testing.assert_close(y, torch.tensor([-0.9961, 0.5020, 0.2510]), atol=5e-5, rtol=0)
    moved = moving_range(first, batch_range(torch.tensor([-2.0, 4.0]), (1,)), 0.01)
    assert moved.flatten().tolist() == pytest.approx([-1.01, 0.535])
    far = fake_quantize(100 * values, scale_of(first, EIGHT), EIGHT)
    torch.autograd.backward([y.sum(), far.sum()])
    assert values.grad is not None
    assert values.grad.tolist() == [101, 101, 101]


def test_the_top_value_saturates_and_ties_go_to_even() -> None:
    scale = torch.tensor([2.0])
    values = torch.tensor([1.0, 3.0, 5.0, 255.0, 1e9, -1e9])
    assert round_to(values, scale, EIGHT).tolist() == [0, 4, 4, 254, 254, -256]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 10), per_row=st.booleans(), power=st.booleans(), seed=st.integers(0, 99))
def test_levels(bits: int, per_row: bool, power: bool, seed: int) -> None:
    """W7: at most 2^bits levels in each group of one scale; no value moves by more than one step."""
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[1.0], [30.0], [0.01]])
    rounding = Rounding(bits, (3, 1) if per_row else (1, 1), power)
    scale = scale_of(batch_range(values, rounding.shape), rounding)
    rounded = round_to(values, scale, rounding)
    for row in rounded if per_row else [rounded]:
        assert row.unique().numel() <= 2**bits
    assert (rounded - values).abs().le(scale.expand(3, 1) * (1 + 1e-4)).all()
    if power:
        assert torch.equal(scale.log2(), scale.log2().round())


def test_ranges() -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, -4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    assert batch_range(values, (2, 1, 1)).flatten().tolist() == [-4, 5, 3, 8]
    assert batch_range(values, (2, 1, 2)).flatten().tolist() == [1, -4, 5, 6, 3, 2, 7, 8]
    joined = joined_range(batch_range(values, (1, 1, 1)), batch_range(-values, (1, 1, 1)))
    assert joined.flatten().tolist() == [-8, 8]
    assert torch.equal(joined_range(empty_range((1, 1, 1)), joined), joined)
    assert scale_of(torch.zeros(2, 1), EIGHT).item() == pytest.approx(1e-8)


def test_the_clip_mask() -> None:
    rounding = Rounding(4, (1,), clip_gradient=True)
    values = torch.tensor([-9.0, -8.0, 0.0, 7.0, 7.4, 8.0], requires_grad=True)
    fake_quantize(values, torch.ones(1), rounding).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 0, 0]


def test_the_gradient_of_a_learned_scale() -> None:
    """Against the formula of Learned Step Size Quantization, written with autograd and a detached rounding error."""
    torch.manual_seed(0)
    values, rounding = torch.randn(2, 50, requires_grad=True), Rounding(3, (2, 1), learned=True)
    scale = torch.tensor([[0.3], [0.7]], requires_grad=True)
    weights = torch.randn(2, 50)
    found = torch.autograd.grad((fake_quantize(values, scale, rounding) * weights).sum(), (values, scale))
    clipped = (values / scale).clamp(-4, 3)
    plain = (clipped + (clipped.round() - clipped).detach()) * scale
    d_values, d_scale = torch.autograd.grad((plain * weights).sum(), (values, scale))
    torch.testing.assert_close(found[0], d_values)
    torch.testing.assert_close(found[1], d_scale / math.sqrt(50 * 3))


def test_learned_scales_are_positive_and_may_be_powers_of_two() -> None:
    log2 = torch.tensor([-1.5, 0.0, 2.2], requires_grad=True)
    torch.testing.assert_close(learned_scale(log2, EIGHT), torch.exp2(log2))
    rounded = learned_scale(log2, Rounding(8, (3,), power_of_two=True))
    assert rounded.tolist() == [0.5, 1, 8]
    rounded.sum().backward()
    assert log2.grad is not None
    torch.testing.assert_close(log2.grad, rounded.detach() * math.log(2))


def test_nothing_is_kept_where_the_gradient_reads_nothing() -> None:
    kept: list[torch.Tensor] = []
    values = torch.randn(10, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_quantize(values, torch.ones(1), EIGHT)
    assert kept == []
