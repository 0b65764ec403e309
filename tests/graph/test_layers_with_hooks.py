"""Layers with hooks stay what they are: others in their place would lose these, or show them something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersenet.graph.folding import foldable
from tersenet.graph.merging import mergeable
from tersenet.graph.model import ModelGraph


def look(*_: object) -> None:
    """Changes nothing."""


@pytest.mark.parametrize("hooked", [None, "0", "1"])
@pytest.mark.parametrize("before", [False, True])
def test_they_are_not_folded_or_merged(hooked: str | None, before: bool) -> None:
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    costly = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)).eval()
    for network in (norm, costly):
        if hooked is not None:
            module = network.get_submodule(hooked)
            add = module.register_forward_pre_hook if before else module.register_forward_hook
            add(look)
    pairs = [] if hooked is not None else [("0", "1")]
    assert foldable(ModelGraph(norm, (torch.randn(1, 3, 8, 8),))) == pairs
    assert mergeable(ModelGraph(costly, (torch.randn(1, 2, 8, 8),))) == pairs
