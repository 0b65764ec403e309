"""A network pruned for the time of one evaluation, quickly: whatever can be known before any episode is known.

Both ways leave the network as it was. It keeps its shape: removed channels are zero.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch

from tersenet.calibration.allocation import Costs, allocate
from tersenet.calibration.curves import measured_curves
from tersenet.calibration.images import Images
from tersenet.calibration.items import Counts, Item
from tersenet.calibration.solver import Solver
from tersenet.data.bundle import Data, Loader
from tersenet.errors import TersenetError
from tersenet.graph.budget import Rounding
from tersenet.graph.compact import mask, silence
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.magnitude import Magnitude
from tersenet.recipe_target import Target
from tersenet.search.amc_settings import RECALIBRATED, AmcSettings
from tersenet.train.recalibrate import recalibrate_bn


class Pruning(Protocol):
    """`pruned(left)`: inside, all but `left` units of every item are gone. `measured`: what `channel_pruning` would
    leave within a budget; other methods have no such thing."""

    def pruned(self, left: Mapping[str, int]) -> AbstractContextManager[None]: ...

    def measured(self, costs: Costs, target: Target, original: int, rounding: Rounding) -> Counts | None: ...


class Reconstructed:
    """As `channel_pruning` does it, with every layer fitted to what it read and gave in the original network.

    One pass over the calibration images gives the second moments of all layers; choosing and fitting need nothing else.
    Differs from the method: layers don't make up for what those before them have lost, since that takes a pass each.
    """

    def __init__(
        self, graph: ModelGraph, items: Sequence[Item], loader: Loader, settings: AmcSettings, device: torch.device
    ) -> None:
        images = Images(loader, settings.images, settings.positions, settings.seed, device)
        self._items = items
        self._solver = Solver(graph, images, "lasso", reconstruct=True)
        self._readers = list({reader.end: reader for item in items for reader in item.readers}.values())
        self._known = self._solver.statistics(self._readers) if self._readers else {}
        self._choices = {item.name: self._solver.choice(item, self._known) for item in items}

    @contextmanager
    def pruned(self, left: Mapping[str, int]) -> Generator[None]:
        with self._solver.trial(self._items):
            for item in self._items:
                if left[item.name] < item.size:
                    self._solver.remove(item, self._choices[item.name].kept(left[item.name]))
            for reader in self._readers:
                if self._solver.left_out(reader).any():
                    self._solver.fit(reader, self._known[reader.end])
            yield

    def measured(self, costs: Costs, target: Target, original: int, rounding: Rounding) -> Counts:
        return allocate(costs, measured_curves(self._solver, self._items), target, original, rounding, {})


class Weakest:
    """As `magnitude` does it by the L1 norm, with batch norm statistics estimated anew from some training batches."""

    def __init__(self, graph: ModelGraph, items: Sequence[Item], data: Data, device: torch.device) -> None:
        groups = [item.group for item in items if item.group is not None]
        scores = Magnitude().scores(graph, groups, Context(device, 0))
        # The strongest first; of equals the last one, as the method has it.
        self._orders = {name: np.argsort(values, kind="stable")[::-1] for name, values in scores.items()}
        self._graph, self._groups, self._loader, self._device = graph, groups, data.train, device

    @contextmanager
    def pruned(self, left: Mapping[str, int]) -> Generator[None]:
        graph = self._graph
        tensors = [*graph.model.parameters(), *graph.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        kept = {group.name: np.sort(self._orders[group.name][: left[group.name]]) for group in self._groups}
        try:
            mask(graph, kept)
            gone = graph.removed(kept)
            for group in self._groups:
                silence(graph, group, gone)
            if self._loader is not None:
                recalibrate_bn(graph.model, self._loader, RECALIBRATED, device=self._device)
            yield
        finally:
            with torch.no_grad():
                for tensor, values in zip(tensors, before, strict=True):
                    tensor.copy_(values)

    def measured(self, costs: Costs, target: Target, original: int, rounding: Rounding) -> None:
        return None


def pruning(
    graph: ModelGraph, items: Sequence[Item], data: Data, settings: AmcSettings, device: torch.device
) -> Pruning:
    """What prunes the network in every episode.

    Raises:
        TersenetError: no training images for `channel_pruning`.
    """
    if settings.prune == "magnitude":
        return Weakest(graph, items, data, device)
    if data.train is None:
        raise TersenetError("channel_pruning calibrates on training images: give some, or choose magnitude (--prune)")
    return Reconstructed(graph, items, data.train, settings, device)
