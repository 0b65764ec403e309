from __future__ import annotations

import pytest
import torch
from torch import nn
from train_support import network, settings_of

from tersenet.errors import TersenetError
from tersenet.train.optim import copy_buffers, make_optimizer, update_average


def test_sgd_has_every_trainable_parameter_with_the_same_decay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = make_optimizer(model, settings_of(lr=0.3, momentum=0.8, weight_decay=1e-4))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 1e-4)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p is not model[0].weight}


def test_nesterov_without_momentum_is_plain_sgd() -> None:
    assert make_optimizer(network(), settings_of(momentum=0)).param_groups[0]["nesterov"] is False


def test_adamw() -> None:
    optimizer = make_optimizer(network(), settings_of(optimizer="adamw", weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_nothing_to_train() -> None:
    with pytest.raises(TersenetError, match="nothing to train"):
        make_optimizer(network().requires_grad_(False), settings_of())


def test_average_follows_with_a_decay_that_grows_to_its_limit() -> None:
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    nn.init.zeros_(average.weight)
    by_hand = 0.0
    for step in range(1, 7):
        update_average(average, model, 0.3, step)
        by_hand += (1 - min(0.3, (1 + step) / (10 + step))) * (1 - by_hand)
    assert average.weight.item() == pytest.approx(by_hand, rel=1e-6)


def test_buffers_are_copied() -> None:
    model, average = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    model(torch.randn(4, 2, 3, 3))
    copy_buffers(average, model)
    assert torch.equal(average.running_mean, model.running_mean)
    assert int(average.num_batches_tracked) == 1
