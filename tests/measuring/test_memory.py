"""Peak memory against sums done by hand: which tensors are alive at which operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersenet.measuring.macs import bytes_of
from tersenet.measuring.memory import LiveStorages, peak_memory

UNIT = 4 * 8 * 8  # bytes of one 8x8 channel


def test_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
    )
    # The caller holds the input (3) all along; the largest pair of neighbours is 16 and 4.
    assert peak_memory(net, torch.zeros(1, 3, 8, 8)) - bytes_of(net) == UNIT * (3 + 16 + 4)


def test_in_place_operators_are_free() -> None:
    def chain(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=inplace)).eval()

    out_of_place, in_place = chain(False), chain(True)
    example = torch.zeros(1, 3, 8, 8)
    assert peak_memory(out_of_place, example) - bytes_of(out_of_place) == UNIT * (3 + 16 + 16)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True))
    assert peak_memory(net, example) - bytes_of(net) == UNIT * (3 + 16)
    assert peak_memory(in_place, example) == peak_memory(out_of_place, example)  # batch norm needs both either way


class Skip(nn.Module):
    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.first = nn.Conv2d(2, 5, 1, bias=False)
        self.wide = nn.Conv2d(5, 20, 1, bias=False)
        self.narrow = nn.Conv2d(20, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skip = x if self.keep else None
        x = self.wide(x)
        x = self.narrow(x)
        return x if skip is None else x + skip


def test_skip_connection_keeps_its_tensor_alive() -> None:
    example = torch.zeros(1, 2, 8, 8)
    plain, residual = Skip(False), Skip(True)
    assert peak_memory(plain, example) - bytes_of(plain) == UNIT * (2 + 20 + 5)
    assert peak_memory(residual, example) - bytes_of(residual) == UNIT * (2 + 5 + 20 + 5)


def test_views_are_free_and_batches_count() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 10, bias=False))
    assert peak_memory(net, torch.zeros(3, 1, 8, 8)) - bytes_of(net) == 3 * (UNIT * (1 + 4) + 40)


def test_double_precision_is_twice_as_much() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    single = peak_memory(net, torch.zeros(1, 3, 8, 8))
    assert peak_memory(net.double(), torch.zeros(1, 3, 8, 8, dtype=torch.float64)) == 2 * single


def test_meta_agrees_with_real_tensors() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    ).eval()
    example = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), LiveStorages(net, example) as live:
        net(example)
    assert peak_memory(net, example) - bytes_of(net) == live.peak
