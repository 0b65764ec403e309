"""A network run from the middle gives the same bits as a whole run, and runs fewer operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import randomise
from tersenet.calibration.resume import Resumed
from tersenet.graph.model import ModelGraph
from tersenet.models.build import build


class Writes(nn.Module):
    """Writes into its tensors: through views, into a buffer made of nothing, and behind a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        half = x[:, :3]
        half.relu_()
        both = torch.zeros(len(x), 12, *x.shape[2:])
        both[:, :6] = x
        both[:, 6:] = F.relu(self.second(x), inplace=True)
        x.add_(1)
        a, b = both.chunk(2, 1)
        return self.last(torch.cat([a + x, b], 1).mean((2, 3)))


class Clones(nn.Module):
    """A clone that is changed while the tensor itself is read later: in the trace both are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        changed = x.clone().relu_()
        return (self.second(changed) + x).mean((2, 3))


def resnet8() -> nn.Module:
    return build("resnet8")


NETWORKS: list[tuple[Callable[[], nn.Module], bool]] = [(resnet8, True), (Writes, False), (Clones, False)]


def batches() -> list[tuple[Any, ...]]:
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 32, 32, generator=drawn),) for n in (4, 4, 3)]


def outputs(graph: ModelGraph) -> list[Tensor]:
    with torch.no_grad():
        return [graph.model(*batch) for batch in batches()]


@pytest.mark.parametrize(("network", "goes"), NETWORKS)
def test_it_gives_the_same_bits_from_everywhere(network: Callable[[], nn.Module], goes: bool) -> None:
    torch.manual_seed(0)
    graph = ModelGraph(randomise(network()).eval(), (torch.zeros(2, 3, 32, 32),))
    wanted = outputs(graph)
    reached = 0
    for to in range(1, len(graph.trace.ops)):
        resumed = Resumed(graph, batches)
        resumed.advance(to, {})
        reached += resumed.at == to
        for number, batch in enumerate(batches()):
            assert torch.equal(resumed.run(number, batch, {}), wanted[number]), to
    assert reached == len(graph.trace.ops) - 1 if goes else reached > 0


def test_what_was_passed_is_not_computed_and_what_follows_is() -> None:
    torch.manual_seed(0)
    graph = ModelGraph(randomise(resnet8()).eval(), (torch.zeros(2, 3, 32, 32),))
    resumed = Resumed(graph, batches)
    convolutions = [op.number for op in graph.trace.ops if op.name == "convolution"]
    before = outputs(graph)
    for place in convolutions[2], convolutions[4]:
        resumed.advance(place, {})
        assert resumed.at == place
    with torch.no_grad():
        graph.model.get_parameter("conv1.weight").zero_()
    assert torch.equal(resumed.run(0, batches()[0], {}), before[0])
    with torch.no_grad():
        graph.model.get_parameter("linear.weight").mul_(2)
        graph.model.get_parameter("linear.bias").mul_(2)
    torch.testing.assert_close(resumed.run(0, batches()[0], {}), 2 * before[0])


def test_actions_behind_it_still_hold() -> None:
    torch.manual_seed(0)
    graph = ModelGraph(randomise(resnet8()).eval(), (torch.zeros(2, 3, 32, 32),))
    convolutions = [op.number for op in graph.trace.ops if op.name == "convolution"]
    seen: list[Any] = []

    def look(func: Any, args: Any, kwargs: Any) -> Any:
        seen.append(args[0].clone())
        return func(*args, **kwargs)

    resumed = Resumed(graph, batches)
    for at in (0, convolutions[-2]):
        resumed.advance(at, {})
        resumed.run(1, batches()[1], {convolutions[-1]: look})
    assert torch.equal(seen[0], seen[1])
    assert np.isfinite(float(seen[0].sum()))
