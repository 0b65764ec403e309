"""A latency table leaves the network alone, and times each layer with its own padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tersenet
from tersenet.lowering.integer_times import names
from tersenet.measuring import layer_latency
from tersenet.measuring.layer_latency import Shape, Tile, measure_table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_in_its_mode_and_precision(training: bool) -> None:
    mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), mirrored).double().train(training)
    table = tersenet.latency_table(network, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert len(table.rows) == 8
    assert [module.training for module in network.modules()] == [training] * 3
    assert {p.dtype for p in network.parameters()} == {torch.float64}


def test_padding_of_other_values_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(conv: nn.Conv2d, *_: Any) -> tuple[float, str]:
        asked.append(conv.padding_mode)
        return 1.0, conv.padding_mode

    monkeypatch.setattr(layer_latency, "_measured", measured)
    for mode in ("zeros", "reflect", "zeros", "circular", "reflect"):
        conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
        table = measure_table([(conv, Shape.of(conv, (1, 2, 6, 6)), "direct", None)])
        assert [row.kernel for row in table.rows] == [mode]
    assert asked == ["zeros", "reflect", "circular"]


@pytest.mark.skipif(not names(), reason="this processor has no instructions for products of bytes")
def test_eight_bits_are_timed_in_integers() -> None:
    conv, grouped = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
    tiles: tuple[Tile, ...] = ("direct", 2, 4)
    shape, other = Shape.of(conv, (1, 16, 8, 8)), Shape.of(grouped, (1, 16, 8, 8))
    table = measure_table([(conv, shape, tile, bits) for tile in tiles for bits in (8, 4, 16)])
    kernels = {(row.tile, row.bits): row.kernel for row in table.rows}
    for bits in (8, 4):
        assert [kernels[tile, bits] for tile in tiles] == ["direct int8", "F2 int8", "F4 int8"]
    assert [kernels[tile, 16].endswith("float") for tile in tiles] == [True] * 3
    (row,) = measure_table([(grouped, other, 4, 8)]).rows
    assert row.kernel.endswith("float")


@pytest.mark.parametrize("padding", ["same", "valid", 0, 1, (0, 2)])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((2, 4), 1), ((5, 1), 2), ((4, 3), (1, 3))])
def test_the_map_is_the_one_that_was_asked_for(padding: Any, kernel: tuple[int, int], dilation: Any) -> None:
    conv = nn.Conv2d(1, 1, kernel, padding=padding, dilation=dilation)
    shape = Shape.of(conv, (1, 1, 9, 12))
    size = layer_latency._input_size(conv, shape)  # pyright: ignore[reportPrivateUsage]
    top, left, bottom, right = layer_latency._pads(conv)  # pyright: ignore[reportPrivateUsage]
    x = torch.randn(1, 1, *size)
    wanted = conv(x)
    assert tuple(wanted.shape[2:]) == shape.map
    padded = nn.functional.pad(x, (left, right, top, bottom))
    found = nn.functional.conv2d(padded, conv.weight, conv.bias, dilation=conv.dilation)
    torch.testing.assert_close(found, wanted)
