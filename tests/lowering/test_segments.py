"""Layers that run as one call: inputs of sizes that there is nothing to run for, and who looks on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tersenet as tn
from tersenet.kernels.host import host
from tersenet.kernels.pool_call import Windows
from tersenet.lowering.pools import MaxPool
from tersenet.lowering.segments import Segment

needs_amx = pytest.mark.skipif(host().amx_problem is not None, reason=f"AMX: {host().amx_problem}")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()


@pytest.mark.parametrize("choice", ["gemm", "F2"])
def test_an_empty_batch_before_and_after_others(choice: str) -> None:
    net = network()
    fast = tn.lower(net, torch.rand(1, 3, 9, 9), choice=choice)
    assert any(isinstance(module, Segment) for module in fast.modules())
    for batch in (0, 2, 0, 2, 0):
        x = torch.rand(batch, 3, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


@needs_amx
def test_the_pool_of_an_empty_batch_keeps_its_type() -> None:
    x = torch.empty(0, 8, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y: Tensor = MaxPool(Windows((2, 2), (2, 2), (0, 0)))(x)
    assert (y.shape, y.dtype) == ((0, 8, 3, 3), torch.bfloat16)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.filterwarnings("ignore")  # this way of torch's is going out of use, and says so
def test_a_trace_holds_what_is_computed(layers: int) -> None:
    net = nn.Sequential(*list(network())[:layers])  # pyright: ignore
    fast = tn.lower(net, torch.rand(2, 3, 9, 9), choice="gemm")
    fast(torch.rand(2, 3, 9, 9))
    traced = torch.jit.trace(fast, torch.rand(2, 3, 9, 9), check_trace=False)  # pyright: ignore
    x = torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)  # pyright: ignore
