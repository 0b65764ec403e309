"""Sizes of operators' results by rule, against torch."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.graph.passes import tensors_in
from tersenet.lowering.shapes import result_of


def _on_meta(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_on_meta(one) for one in value]  # pyright: ignore
    return value.to("meta") if isinstance(value, Tensor) else value


A = torch.ops.aten
SIZES = st.integers(1, 12)


def _moves(draw: st.DrawFn) -> dict[str, Any]:
    return {name: draw(st.integers(low, 3)) for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))}


@st.composite
def operations(draw: st.DrawFn) -> tuple[Any, tuple[Any, ...]]:
    """An operator with a rule, and arguments that may or may not fit."""
    N, C, H, W = draw(st.tuples(SIZES, SIZES, SIZES, SIZES))
    x = torch.randn(N, C, H, W)
    x = x.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else x
    moves, k, K = _moves(draw), draw(st.integers(1, 4)), draw(SIZES)
    step, around, gap = ([moves[name]] * draw(st.integers(1, 2)) for name in ("stride", "padding", "dilation"))
    weight = torch.randn(K, draw(st.sampled_from([C, C, 1, 3])), k, draw(st.integers(1, 4)))
    groups = draw(st.sampled_from([1, 1, C]))
    ceil, axis, keep = draw(st.booleans()), draw(st.integers(-5, 4)), draw(st.booleans())
    y = torch.randn(*(n if draw(st.booleans()) else 1 for n in x.shape))
    per_channel = [torch.rand(C if draw(st.booleans()) else K) for _ in range(4)]
    return draw(
        st.sampled_from(
            [
                (A.conv2d.default, (x, weight, None, step, around, gap, groups)),
                (A.conv2d.default, (x, weight, torch.rand(K), step, around)),
                (A.conv2d.padding, (x, weight, None, step, draw(st.sampled_from(["same", "valid"])), gap, groups)),
                (A.conv1d.default, (x[..., 0], weight[..., 0], None, step[:1], around[:1], gap[:1], groups)),
                (A.max_pool2d.default, (x, [k, k], step, around, gap, ceil)),
                (A.max_pool2d.default, (x, [k, k])),
                (A.avg_pool2d.default, (x, [k], step, around, ceil)),
                (A.adaptive_avg_pool2d.default, (x, [k, K])),
                (A.linear.default, (x, torch.randn(K, draw(st.sampled_from([W, W, 5]))), torch.randn(K))),
                (A.matmul.default, (x, torch.randn(*y.shape[:2], draw(st.sampled_from([W, W, 5])), K))),
                (A.scaled_dot_product_attention.default, (x, torch.randn(N, C, K, W), torch.randn(N, C, K, k))),
                (A.mean.dim, (x, [axis], keep)),
                (A.sum.dim_IntList, (x, [2, 3], keep)),
                (A.mean.dim, (x, [axis, axis])),
                (A.cat.default, ([x, torch.randn(N, K, H, W)], 1)),
                (A.cat.default, ([x, y], axis)),
                (A.softmax.int, (x, axis)),
                (A.softmax.int, (x, 1, torch.float64)),
                (A.batch_norm.default, (x, *per_channel, False, 0.1, 1e-5, True)),
                (A.group_norm.default, (x, k, *per_channel[:2])),
                (A.layer_norm.default, (x, [*x.shape[-1:]], torch.rand(draw(st.sampled_from([W, 3]))))),
                (draw(st.sampled_from([A.relu, A.silu_, A.hardtanh, A.sigmoid, A.gelu])).default, (x,)),
                (draw(st.sampled_from([A.add, A.mul, A.sub_, A.div_])).Tensor, (x, y)),
                (draw(st.sampled_from([A.add, A.mul, A.sub_])).Tensor, (y, x)),
                (A.mul.Tensor, (x, draw(st.sampled_from([2, 0.5, True, y.double(), y.int()])))),
                (A.pow.Tensor_Scalar, (x, draw(st.sampled_from([2, 0.5])))),
                (A.clamp.default, (x, 0, 6)),
            ]
        )
    )


@settings(max_examples=200, deadline=None)
@given(operations())
def test_sizes_of_results(operation: tuple[Any, tuple[Any, ...]]) -> None:
    """What a rule says is what torch computes; a rule says nothing where torch has an error."""
    operator, args = operation
    found = result_of(operator, _on_meta(args), {})
    try:
        expected = operator(*args)
    except (RuntimeError, IndexError):
        assert found is None
        return
    if found is None:
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if all(x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last) for x in tensors_in(args)):
        assert expected.stride() == found.stride() or 1 in expected.shape


def test_rules_know_the_usual_operators() -> None:
    x, weight = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(6, 4, 3, 3, device="meta")
    for operator, args in ((A.conv2d.default, (x, weight)), (A.relu_.default, (x,)), (A.add.Tensor, (x, x[:, :1]))):
        assert result_of(operator, args, {}) is not None
