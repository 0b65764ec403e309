"""Shapes and memory orders that are worked out without torch are those that its kernels give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.graph.shapes import empty_product, on_meta

aten = torch.ops.aten


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[object, ...]:
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = st.integers(1, 7)
    x = torch.zeros(draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), *(draw(sizes) for _ in range(axes)))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    weight = torch.zeros(groups * draw(st.integers(1, 2)), x.shape[1] // groups, *kernel)
    if axes == 2:
        orders = st.sampled_from([torch.contiguous_format, torch.channels_last])
        x, weight = x.to(memory_format=draw(orders)), weight.to(memory_format=draw(orders))
    # In float32 torch's CPU build crashes on some of these (channels last, groups and dilation).
    x, weight = x.double(), weight.double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if draw(st.booleans()) else None
    numbers = [[draw(st.integers(low, 2))] * axes for low in (1, 0, 1)]
    return (x, weight, bias, *numbers, False, [0] * axes, groups)


@given(convolutions())
@settings(max_examples=150, deadline=None)
def test_a_convolution_makes_what_torch_makes(args: tuple[object, ...]) -> None:
    made = empty_product(aten.convolution.default, args)
    try:
        real = aten.convolution.default(*args)
    except RuntimeError:
        assert made is None, "torch refuses it, and says why"
        return
    assert made is not None
    assert made.shape == real.shape
    # Strides of axes of one place mean nothing, and the kernels differ there.
    strides = [(a, b) for a, b, size in zip(made.stride(), real.stride(), real.shape, strict=True) if size > 1]
    assert all(a == b for a, b in strides)


def test_products_of_matrices() -> None:
    a, b, bias = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(5)
    for func, args in ((aten.mm.default, (a, b)), (aten.addmm.default, (bias, a, b))):
        made = empty_product(func, args)
        assert made is not None
        assert made.shape == (2, 5)
    assert empty_product(aten.mm.default, (a, a)) is None


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_elementwise_operators_on_meta_keep_shape_and_memory_order(order: torch.memory_format) -> None:
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=order)
    for func, args in (
        (aten.relu.default, (x,)),
        (aten.add.Tensor, (x, x)),
        (aten.mul.Tensor, (x, torch.empty(1, 3, 1, 1, device="meta"))),
        (aten.relu_.default, (x,)),
    ):
        made, real = on_meta(func, args, {}), func(*args)
        assert (made.shape, made.stride()) == (real.shape, real.stride())


class NormsOfRows(nn.Module):
    """Layer norms over channels that are put last, as in ConvNeXt: its convolutions get channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 12, 2, 2), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.expand, self.narrow = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 12, 1)
        self.first, self.norm, self.last = (nn.LayerNorm(12) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = _rows(self.first, self.stem(x))
        x = self.narrow(self.expand(_rows(self.norm, self.depthwise(x))).relu()) + x
        x = _rows(self.last, nn.functional.adaptive_avg_pool2d(x, 1))
        return self.head(x.flatten(1))


def _rows(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_operators_that_depend_on_the_memory_order_are_traced_as_they_run() -> None:
    graph = ModelGraph(NormsOfRows().double().eval(), (torch.randn(1, 3, 16, 16, dtype=torch.float64),))
    before = graph.macs()
    kept = {g.name: np.arange(g.size // 2) for g in graph.groups if not g.frozen}
    assert kept
    done = compact(graph, kept)
    assert done.equality.relative <= done.equality.tolerance
    assert graph.macs() < before
