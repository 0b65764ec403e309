"""Layers with several ways of computing them: what each costs in time and in loss, and the choice made an edit."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tersenet.errors import TersenetError
from tersenet.graph.convolutions import Convolution, convolutions
from tersenet.graph.edits_layers import Quantize, Winograd, replace_module
from tersenet.graph.trace import evaluating
from tersenet.measuring.layer_latency import LatencyTable, Shape, Tile, Wanted, measure_table
from tersenet.nn.candidates import CandidateConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d, calibration
from tersenet.nn.winograd_settings import Quantization, WinogradSettings
from tersenet.train import distributed
from tersenet.train.batch import cross_entropy, forward, move
from tersenet.train.ranges import calibrate_ranges, share_ranges
from tersenet.winograd_search.knapsack import best_under

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph
    from tersenet.methods.base import Context

Way = WinogradSettings | Quantization | None
"""How a convolution is computed; None: as it is."""
Chosen = dict[str, int]
"""Layer -> the place of its way."""


class Layers:
    """Layers and their ways, with the latency of each.

    Args:
        found: every layer, with its ways; the first is None.
        plain: whether a layer may stay as it is.
        table: file of a latency table; None: measured here.
        batch: images at a time, where it is measured.

    Raises: TersenetError for a table that is none, or that has no row for a layer.
    """

    def __init__(
        self, found: Sequence[tuple[Convolution, tuple[Way, ...]]], plain: bool, table: str | None, batch: int
    ):
        self.ways: dict[str, tuple[Way, ...]] = {conv.name: ways for conv, ways in found}
        self.plain = plain
        self.loss: dict[str, list[float]] = {}
        wanted = {conv.name: [_wanted(conv, way) for way in ways] for conv, ways in found}
        rows = (row for each in wanted.values() for passes in each for row in passes)

        def found_table() -> LatencyTable:
            return LatencyTable.load(table) if table is not None else measure_table(rows, batch)

        # No two processes measure the same times, and all have to choose alike.
        self.table = distributed.from_first(found_table)
        self.ms = {
            name: [sum(self.table.ms(*row[1:]) for row in passes) for passes in each] for name, each in wanted.items()
        }

    @property
    def before(self) -> float:
        """Milliseconds of all layers as they are."""
        return sum(times[0] for times in self.ms.values())

    def latency(self, chosen: Chosen) -> float:
        return sum(self.ms[name][place] for name, place in chosen.items())

    def allowed(self, name: str) -> range:
        """Places of the ways that may be chosen."""
        return range(0 if self.plain else 1, len(self.ways[name]))

    def check_budget(self, share: float) -> float:
        """Milliseconds that are `share` of what the layers cost now. Raises: TersenetError if none is so fast."""
        fastest = sum(min(times[place] for place in self.allowed(name)) for name, times in self.ms.items())
        if fastest > share * self.before:
            raise TersenetError(
                f"the fastest candidates take {fastest:.3f} ms, {fastest / self.before:.0%} of what the layers take as "
                f"they are ({self.before:.3f} ms); a share of {share:.0%} is out of reach: give a larger one, or more "
                "tiles and bits"
            )
        return share * self.before

    @contextmanager
    def installed(self, model: nn.Module) -> Generator[dict[str, CandidateConv2d]]:
        """Inside, each layer is a `CandidateConv2d` of its ways, which share its parameters."""
        made = {name: self._candidate(model, name) for name in self.ways}
        originals = {name: model.get_submodule(name) for name in self.ways}
        for name, layer in made.items():
            replace_module(model, originals[name], layer)
        try:
            yield made
        finally:
            for name, layer in made.items():
                replace_module(model, layer, originals[name])

    def observe(self, model: nn.Module, context: Context, batches: int, made: dict[str, CandidateConv2d]) -> None:
        """Take the ranges of every way from training images, each with the inputs that its layer has now."""
        for layer in made.values():
            layer.observing = True
        try:
            with torch.no_grad(), evaluating(model), calibration(model):
                for inputs, _ in self._batches(context, batches):
                    forward(model, inputs)
        finally:
            for layer in made.values():
                layer.observing = False
        share_ranges(model)

    def sensitivities(self, graph: ModelGraph, context: Context, batches: int) -> None:
        """The loss on training images that each way of each layer adds, with all other layers as they are."""
        model = graph.model
        with self.installed(model) as made:
            self.observe(model, context, batches, made)

            def loss() -> float:
                total = n = 0.0
                with torch.no_grad(), evaluating(model):
                    for inputs, targets in self._batches(context, batches):
                        total += float(self.task(context)(forward(model, inputs), targets)) * len(targets)
                        n += len(targets)
                # Every rank saw other images, and all have to choose alike.
                total, n = distributed.all_reduce_sum(torch.tensor([total, n]).double(), context.device).tolist()
                return total / n

            base = loss()
            for name, layer in made.items():
                self.loss[name] = [0.0]
                for place in range(1, len(self.ways[name])):
                    layer.best = ((place, None),)
                    self.loss[name].append(loss() - base)
                layer.best = ((0, None),)

    def knapsack(self, budget: float) -> Chosen:
        """The ways of the smallest sum of losses within `budget` milliseconds."""
        names = list(self.ways)
        items = [[(self.ms[n][p], self.loss[n][p], p) for p in self.allowed(n)] for n in names]
        return dict(zip(names, best_under(items, budget), strict=True))

    def put(self, graph: ModelGraph, context: Context, chosen: Chosen, batches: int) -> None:
        """Make the choice the network's: edits, and ranges from training images."""
        for name, place in chosen.items():
            way = self.ways[name][place]
            if isinstance(way, WinogradSettings):
                graph.apply(Winograd(module=name, settings=way))
            elif way is not None:
                graph.apply(Quantize(module=name, quantization=way))
        assert context.data is not None
        assert context.data.train is not None
        calibrate_ranges(graph.model, context.data.train, batches, device=context.device)

    def notes(self, chosen: Chosen, shares: dict[str, list[float]] | None = None) -> list[str]:
        """The choice of every layer, and what all of them cost by the table."""
        after, table = self.latency(chosen), self.table
        found = [
            f"latency of {len(chosen)} layers by the table: {self.before:.3f} -> {after:.3f} ms "
            f"({after / self.before:.0%}), {table.batch} image(s) at a time, {table.threads} thread(s), "
            f"{table.environment.get('processor', 'an unnamed machine')}"
        ]
        for name, place in chosen.items():
            more = f", {self.loss[name][place]:+.4f} in loss" if name in self.loss else ""
            more += f", chosen with {shares[name][place]:.0%}" if shares is not None else ""
            ms = self.ms[name]
            found.append(f"{name}: {title(self.ways[name][place])}, {ms[0]:.3f} -> {ms[place]:.3f} ms{more}")
        return found

    def task(self, context: Context) -> Any:
        """(outputs, targets) -> the loss that the data has, or cross entropy."""
        given = context.data.loss if context.data is not None else None
        return given or cross_entropy

    def _batches(self, context: Context, batches: int) -> Generator[tuple[Any, Any]]:
        assert context.data is not None
        assert context.data.train is not None
        for inputs, targets in itertools.islice(context.data.train.batches(0), batches):
            yield move(inputs, context.device), move(targets, context.device)

    def _candidate(self, model: nn.Module, name: str) -> CandidateConv2d:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        return CandidateConv2d([_module(conv, way) for way in self.ways[name]]).train(conv.training)


def _module(conv: nn.Conv2d, way: Way) -> nn.Module:
    if isinstance(way, WinogradSettings):
        # What a search would make of transforms is gone once it has chosen: they are trained afterwards.
        return WinogradConv2d.from_conv(conv, way.model_copy(update={"flex": "static"}))
    return conv if way is None else QuantizedConv2d.from_conv(conv, way)


def _wanted(conv: Convolution, way: Way) -> list[Wanted]:
    """What to look up: each of the layer's passes."""
    tile: Tile = way.tile if isinstance(way, WinogradSettings) else "direct"
    return [
        (conv.module, Shape.of(conv.module, outputs), tile, bits_of(way)) for outputs in (conv.outputs, *conv.others)
    ]


def bits_of(way: Way) -> int | None:
    quantization = way.quantization if isinstance(way, WinogradSettings) else way
    return quantization.input.bits if quantization is not None and quantization.input is not None else None


def title(way: Way) -> str:
    """Such as `F4 at 8 bits`."""
    bits = bits_of(way)
    tile = f"F{way.tile}" if isinstance(way, WinogradSettings) else "direct"
    return f"{tile} {'in floating point' if bits is None else f'at {bits} bits'}"


def measured(model: nn.Module, example: tuple[Any, ...], bits: Sequence[int | None], batch: int) -> LatencyTable:
    """The table of every convolution of `model`: direct, F2, F4 and F6 where they fit, for each number of bits.

    Raises: TersenetError if there is no convolution.
    """
    from tersenet.graph.model import ModelGraph

    wanted: list[Wanted] = []
    for conv in convolutions(ModelGraph(model, example))[0]:
        fits = conv.hindrance(strided=False) is None
        tiles: list[Tile] = ["direct", *(m for m in (2, 4, 6) if fits and m <= min(conv.sides))]
        for outputs in (conv.outputs, *conv.others):
            shape = Shape.of(conv.module, outputs)
            for width, tile in itertools.product(bits, tiles):
                row: Wanted = (conv.module, shape, tile, width)
                wanted.append(row)
    if not wanted:
        raise TersenetError(f"{type(model).__name__} has no convolution to measure")
    return measure_table(wanted, batch)
