"""Multiplications where zeros count not: networks and batches at the edges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersenet.cli.measure import _workload as text  # pyright: ignore[reportPrivateUsage]
from tersenet.errors import TersenetError
from tersenet.measuring.workload import workload
from tersenet.nn.masked import MaskedConv2d


def network() -> nn.Module:
    return nn.Sequential(MaskedConv2d.from_conv(nn.Conv2d(2, 3, 3))).train()


def test_images_without_any_activation_leave_nothing_to_count() -> None:
    found = workload(network(), [(torch.zeros(2, 2, 6, 6), None)], 2)
    assert [row.exact for row in found.rows] == [0.0]
    assert "infinitely many times fewer than dense in the sparse layers, infinitely many in all" in text(found, None)


def test_a_batch_of_named_inputs_is_refused_and_the_network_is_as_it_was() -> None:
    model = network()
    with pytest.raises(TersenetError, match="not on a dict"):
        workload(model, [({"x": torch.zeros(2, 2, 6, 6)}, None)], 2)
    assert model.training
    assert not model[0]._forward_pre_hooks  # pyright: ignore
