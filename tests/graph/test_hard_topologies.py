"""Networks that are hard for structured pruning: compact equals masked, and the channels that should be free are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph import hard_topologies as hard
from graph_support import check_exact, randomise
from tersenet.graph.model import ModelGraph

OUTPUT = "the network's output"

FREE: dict[type[nn.Module], int] = {
    hard.AddCat: 10,
    hard.MultiConcat: 18,
    hard.GroupWise: 18,
    hard.DwConv: 12,
    hard.MultiBind: 8,
    hard.Expand: 14,
    hard.MultipleUse: 14,
    hard.Attention: 10,
    hard.NonLocal: 12,
    hard.CascadedConcat: 38,
    hard.ConcatAlongRows: 8,
    hard.TwoInTwoOut: 24,
    hard.OddParameters: 16,
    hard.ShuffleUnit: 20,
    hard.Res2Net: 28,
    hard.CrossStage: 46,
    hard.DualPath: 21,
    hard.MixedKernels: 12,
    hard.PartialSum: 12,
    hard.SelectiveKernel: 26,
    hard.SplitAttention: 18,
    hard.Ghost: 14,
    hard.ResponseNorm: 24,
    hard.RepVGG: 18,
    hard.C2f: 32,
}
"""Units that can be removed one by one, of all but the output's: none of these networks has a channel to freeze."""

BESIDE_A_SUM = (hard.Attention, hard.CrossStage, hard.DwConv, hard.RepVGG, hard.ResponseNorm)


def example(network: type[nn.Module]) -> tuple[torch.Tensor, ...]:
    x = torch.zeros(2, 3, 8, 8)
    return (x, x[:, :2]) if network is hard.TwoInTwoOut else (x,)


@pytest.mark.parametrize("network", FREE, ids=lambda network: network.__name__)
def test_every_inner_channel_is_free(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    groups = ModelGraph(randomise(network()), example(network)).groups
    assert {g.name: g.frozen for g in groups if g.frozen not in (None, OUTPUT)} == {}
    assert sum(g.size for g in groups if g.frozen is None) == FREE[network]


@pytest.mark.parametrize("rate", [0.4, *(pytest.param(r, marks=pytest.mark.slow) for r in (0.2, 0.7))])
@pytest.mark.parametrize("network", FREE, ids=lambda network: network.__name__)
def test_compact_equals_masked(network: type[nn.Module], rate: float) -> None:
    torch.manual_seed(0)
    check_exact(network(), example(network), "coupled", rate)


@pytest.mark.parametrize("network", BESIDE_A_SUM, ids=lambda network: network.__name__)
def test_compact_equals_masked_with_independent_blocks(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    check_exact(network(), example(network), "independent")
