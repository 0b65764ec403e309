"""Max pools of lowered networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tersenet.lowering.lower import lower
from tersenet.lowering.pools import MaxPool

POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d((3, 2), (2, 1), (1, 0), ceil_mode=True),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_pool_runs_on_the_generated_kernel(pool: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), pool).eval()
    x = torch.randn(2, 3, 13, 15)
    fast = lower(net, x, choice="direct")
    assert any(isinstance(module, MaxPool) for module in fast.modules())
    assert "max_pool2d" not in fast.report.other
    for one in (x, x[:1]):
        torch.testing.assert_close(fast(one), net(one), rtol=1e-4, atol=1e-5)


def test_dilated_pools_and_indices_stay_with_torch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.max_pool2d(self.conv(x), 2, 1, dilation=2)
            return nn.functional.max_pool2d(y, 2, return_indices=True)[1].float()

    net, x = Net().eval(), torch.randn(1, 3, 16, 16)
    fast = lower(net, x, choice="direct", tolerance=0.5)
    assert not any(isinstance(module, MaxPool) for module in fast.modules())
    assert fast(x).shape == net(x).shape


def test_other_memory_is_left_to_torch() -> None:
    fast = lower(nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2)).eval(), torch.randn(1, 3, 8, 8), choice="direct")
    (pool,) = (module for module in fast.modules() if isinstance(module, MaxPool))
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for one in (x, x.double(), x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(pool(one), nn.functional.max_pool2d(one, 2))


def test_torch_means_torch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2)).eval()
    assert lower(net, torch.randn(1, 3, 8, 8), choice="torch").report.other == {"max_pool2d": 1}
