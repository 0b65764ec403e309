"""What outputs are compared with stays as it is, whatever the network does to its inputs, and goes with its owner."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.calibration.images import Images
from tersenet.calibration.outputs import Outputs
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph


class Normalises(nn.Module):
    """In place, in what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.sub_(0.5).mul_(2)).relu()).mean((2, 3))


class Reused:
    """A loader that fills the same memory for every batch."""

    n = 90

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        memory, drawn = torch.empty(30, 3, 8, 8), torch.Generator().manual_seed(epoch)
        for _ in range(3):
            yield memory.normal_(generator=drawn), torch.zeros(30)

    def __len__(self) -> int:
        return 3


def setting(images: int = 40) -> tuple[ModelGraph, Images, NDArrayBool]:
    torch.manual_seed(0)
    graph = ModelGraph(Normalises().eval(), (torch.randn(2, 3, 8, 8),))
    gone = np.zeros(int(graph.units.of.max()) + 1, dtype=bool)
    return graph, Images(Reused(), images, 4, 0, torch.device("cpu")), gone  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("images", [40, 90])
def test_a_network_that_writes_into_its_input_differs_from_itself_by_nothing(images: int) -> None:
    graph, of, gone = setting(images)
    outputs = Outputs(graph, of, gone)
    assert [outputs.error(gone) for _ in range(2)] == [0.0, 0.0]
    outputs.advance(4, gone)
    assert [outputs.error(gone) for _ in range(2)] == [0.0, 0.0]
    # Another one sees the same images.
    assert Outputs(graph, of, gone).error(gone) == 0.0
    with torch.no_grad():
        graph.model.get_parameter("second.weight").mul_(2)
    assert outputs.error(gone) > 0.1


def test_images_are_those_that_were_loaded() -> None:
    _, images, _ = setting()
    drawn = torch.Generator().manual_seed(0)
    wanted = torch.cat([torch.randn(30, 3, 8, 8, generator=drawn) for _ in range(3)])
    for _ in range(2):
        seen = [x for (x,) in images.batches()]
        assert torch.equal(torch.cat(seen), wanted[:40])
        others = torch.cat([x for (x,) in images.others(128)])
        assert torch.equal(others, wanted[40:])
        for x in (*seen, others):
            x.zero_()


@contextmanager
def without_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_what_a_run_is_resumed_from_goes_at_once() -> None:
    graph, images, gone = setting()
    with without_collector():
        outputs = Outputs(graph, images, gone)
        outputs.advance(4, gone)
        kept = weakref.ref(outputs._resumed)  # pyright: ignore[reportPrivateUsage]
        del outputs
        assert kept() is None
