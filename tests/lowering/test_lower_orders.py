"""Grouped convolutions between learned orders of channels, lowered: norms are folded through an order, and memory stays
channels-last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tersenet as tn
from graph_support import randomise
from tersenet.nn.group_shuffle import GroupShuffleConv2d


def shuffled(C_in: int, C_out: int, groups: int, kernel: int = 1) -> GroupShuffleConv2d:
    conv = nn.Conv2d(C_in, C_out, kernel, padding=kernel // 2, bias=False)
    rows, columns = tuple(torch.randperm(C_out).tolist()), tuple(torch.randperm(C_in).tolist())
    return GroupShuffleConv2d.from_conv(conv, groups, rows, columns)


class Block(nn.Module):
    """A residual block of which every convolution has an order on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.a_norm = shuffled(16, 32, 4, 3), nn.BatchNorm2d(32)
        self.b, self.b_norm = shuffled(32, 16, 2), nn.BatchNorm2d(16)
        self.picked = nn.Conv2d(8, 8, 1)
        self.p_norm = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)
        self.head = nn.Linear(22, 5)
        self.register_buffer("some", torch.tensor([1, 4, 5, 8, 9, 12, 14, 15]), persistent=False)
        self.register_buffer("few", torch.tensor([7, 0, 0, 1, 5, 3]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.a_norm(self.a(x)).relu()
        x = (self.b_norm(self.b(y)) * self.scale + x).relu()
        # Neither is a permutation: what reads channels twice, or not at all, is left alone.
        z = self.p_norm(self.picked(x.index_select(1, self.some)).index_select(1, self.few))
        return self.head(torch.cat([x, z], 1).mean((2, 3)))


def test_orders_of_channels() -> None:
    torch.manual_seed(0)
    model = randomise(Block()).eval()
    fast = tn.lower(model, torch.rand(2, 3, 13, 11), choice="direct")
    read: list[bool] = []
    for layer in fast.graph.children():
        layer.register_forward_pre_hook(
            lambda module, args: read.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    for batch in (1, 3):
        x = torch.rand(batch, 3, 13, 11)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert read == [True] * 8
    # Two norms and a factor, each behind an order.
    assert fast.report.folded == 3
    assert fast.report.other["select_channels"] == 6
    assert fast.report.other["batch_norm"] == 1
    assert "index_select" not in fast.report.other
