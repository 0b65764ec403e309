"""A network's channels chosen and its layers fitted one after another, in the order in which they run.

The network keeps its shape while that is done: removed channels are zero everywhere. Cutting them comes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.calibration.choose import Choice, Selection, choose
from tersenet.calibration.images import Images
from tersenet.calibration.items import Counts, Item
from tersenet.calibration.original import Original
from tersenet.calibration.outputs import Outputs
from tersenet.calibration.readers import Reader, units_read
from tersenet.calibration.refit import plain_error, refit
from tersenet.calibration.resume import Resumed
from tersenet.calibration.sampling import Statistics, Targets, rows, statistics
from tersenet.data.order import generator
from tersenet.graph.compact import mask, silence
from tersenet.graph.labels import IntArray, NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import over_kept
from tersenet.progress import Progress
from tersenet.results import LayerFit
from tersenet.train import distributed


@dataclass
class Solver:
    """`graph` has the network that is worked on. As it is when this is made, it says what is wanted."""

    graph: ModelGraph
    images: Images
    selection: Selection
    reconstruct: bool
    progress: Progress = field(default_factory=Progress)
    original: Original | None = None
    """What is wanted, where earlier steps have changed the network."""
    gone: NDArrayBool = field(init=False)
    kept: dict[str, IntArray] = field(default_factory=dict[str, IntArray])
    fits: list[LayerFit] = field(default_factory=list[LayerFit])
    notes: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.gone = np.zeros(int(self.graph.units.of.max()) + 1, dtype=bool)
        self._sampled: dict[int, NDArrayBool] = {}
        self._targets: Targets | None = None
        self._resumed = Resumed(self.graph, self.images.batches)
        self.outputs = Outputs(self.graph, self.images, self.gone)

    def run(self, items: Sequence[Item], readers: Sequence[Reader], left: Counts, part: str = "solved") -> None:
        """Remove all but `left` units of every item. Fit every layer that has lost inputs, and all behind the first
        loss for which there are rows enough. What `progress` has under the name `part` is taken from there."""
        if self.selection == "lasso" or self.reconstruct:
            self._targets = Targets(self.graph, readers, self.images, self.original)
        shrinking = [item for item in items if left[item.name] < item.size]
        for item in shrinking:
            if not item.readers:
                self.remove(item, self.choice(item, {}).kept(left[item.name]))
        self.start()
        for place, reader in enumerate(readers):
            waiting = [i for i in shrinking if reader in i.readers and i.name not in self.kept]
            done = self.progress.get(f"{part} {place}")
            if done is not None:
                self._restore(reader, waiting, done)
                continue
            self.advance([i for i in shrinking if i.name not in self.kept], readers[place:])
            fits, notes = len(self.fits), len(self.notes)
            self._solve(reader, waiting, left)
            done = {
                "kept": {item.name: torch.from_numpy(self.kept[item.name]) for item in waiting},
                "tensors": [t.detach().clone() for t in self.tensors(reader)],
                "fits": [fit.model_dump() for fit in self.fits[fits:]],
                "notes": self.notes[notes:],
            }
            self.progress.put(f"{part} {place}", done)

    def _solve(self, reader: Reader, waiting: list[Item], left: Counts) -> None:
        """Remove what goes of the items for which this is the first reader, and fit it."""
        known: dict[int, Statistics] = {}
        if waiting and (self.selection == "lasso" or self.reconstruct):
            wanted = {r.end: r for item in waiting for r in item.readers}
            known = self.statistics(list(wanted.values()) if self.selection == "lasso" else [reader])
        for item in waiting:
            self.remove(item, self.choice(item, known).kept(left[item.name]))
        if self.left_out(reader).any() or (self.kept and self.determined(reader)):
            self._fit(reader, known if len(known) == 1 else {}, waiting)

    def _restore(self, reader: Reader, waiting: list[Item], done: dict[str, Any]) -> None:
        for item in waiting:
            self.remove(item, done["kept"][item.name])
        with torch.no_grad():
            for tensor, value in zip(self.tensors(reader), done["tensors"], strict=True):
                tensor.copy_(value)
        self.fits += [LayerFit.model_validate(fit) for fit in done["fits"]]
        self.notes += done["notes"]

    def changing_from(self, items: Sequence[Item], readers: Sequence[Reader] = ()) -> int:
        """The first operator that choosing and fitting these can change."""
        ends = [m.end for item in items if item.group is not None for m in item.group.members]
        ends += [reader.end for item in items for reader in item.readers] + [reader.end for reader in readers]
        return min((use for end in ends for use in self.graph.ends[end].uses), default=0)

    def start(self) -> None:
        """Run from the beginning again."""
        self._resumed = Resumed(self.graph, self.images.batches)
        self.outputs.restart()

    def advance(self, items: Sequence[Item], readers: Sequence[Reader]) -> None:
        """Before these are chosen and fitted: what none of that can change is run once."""
        self._resumed.advance(self.changing_from(items, readers), over_kept(self.graph, self.gone))
        self.advance_probe(items, readers)

    def advance_probe(self, items: Sequence[Item], readers: Sequence[Reader] = ()) -> None:
        """Before trials of these: what none of them can change is run once."""
        self.outputs.advance(self.changing_from(items, readers), self.gone)

    def choice(self, item: Item, known: dict[int, Statistics]) -> Choice:
        drawn = generator("channels", self.images.seed, item.name)
        return choose(self.graph, item, known, self.selection, self.gone, drawn)

    def use(self, targets: Targets) -> None:
        """From now on what is wanted is read there."""
        self._targets = targets

    def rows(self, reader: Reader) -> Iterator[tuple[Tensor, Tensor]]:
        """What `statistics` sums up for one reader: rows of what it reads and of what it should give."""
        seen = rows(self.graph, self._targets, [reader], self.images, self.gone, self._resumed)
        return ((x, wanted) for _, x, wanted in seen)

    def statistics(self, readers: Sequence[Reader]) -> dict[int, Statistics]:
        """Of the network as it is and of what is wanted of it; before the run, that is what it gives."""
        return statistics(self.graph, self._targets, readers, self.images, self.gone, self._resumed)

    def remove(self, item: Item, places: Tensor) -> None:
        """Zero all units of an item but those at `places`. Every process removes what the first one chose."""
        places = places.cpu()
        distributed.broadcast([places])
        kept = places.numpy()
        self.kept[item.name] = kept
        out = np.delete(item.units, kept)
        if item.group is None:
            reader = item.readers[0]
            self._sampled[reader.end] = np.isin(units_read(self.graph, reader), out)
            self._drop_inputs(reader)
            return
        gone = np.zeros_like(self.gone)
        gone[out] = True
        self.gone |= gone
        mask(self.graph, {item.group.name: kept})
        silence(self.graph, item.group, gone)

    def left_out(self, reader: Reader) -> NDArrayBool:
        """(groups, inputs): what it does not read any more."""
        lost = self.gone[units_read(self.graph, reader)]
        return lost | self._sampled[reader.end] if reader.end in self._sampled else lost

    def fit(self, reader: Reader, found: Statistics) -> tuple[float, list[str]]:
        done = refit(self.graph, reader, found, list(self.left_out(reader)), self.gone)
        distributed.broadcast(t.detach() for t in self.tensors(reader))
        return done

    def tensors(self, reader: Reader) -> list[Tensor]:
        """What a fit changes."""
        layers = [reader.layer, *([reader.norm[0]] if reader.norm is not None else [])]
        modules = [self.graph.model.get_submodule(layer) for layer in layers]
        return [t for m in modules for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]]

    @contextmanager
    def trial(self, items: Sequence[Item]) -> Generator[None]:
        """What is done to these items inside is undone afterwards."""
        tensors = [t for item in items for reader in item.readers for t in self.tensors(reader)]
        for item in items:
            for member in item.group.members if item.group is not None else ():
                end = self.graph.ends[member.end]
                tensors += [self.graph.tensor(name) for name in end.tensors]
        values = [t.detach().clone() for t in tensors]
        gone, sampled, kept = self.gone.copy(), dict(self._sampled), dict(self.kept)
        try:
            yield
        finally:
            self.gone, self._sampled, self.kept = gone, sampled, kept
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)

    def damage(self) -> float:
        """The share of the outputs' variance that is missed. Of several losses together it is about the sum."""
        return self.output_error() ** 2

    def output_error(self) -> float:
        """The difference of the outputs from the original's, as a share of their deviation (root mean square)."""
        return self.outputs.error(self.gone)

    def _fit(self, reader: Reader, known: dict[int, Statistics], waiting: list[Item]) -> None:
        lost, whole = int(self.left_out(reader).sum()), self.left_out(reader).size
        entry = LayerFit(name=reader.layer, before=whole, after=whole - lost)
        self.fits.append(entry)
        if not self.reconstruct:
            return
        # A mean over channels, such as a layer norm's, has changed with those that went since then.
        found = known.get(reader.end) if waiting and not self.graph.found.statistics else None
        found = self.statistics([reader])[reader.end] if found is None else found
        entry.unfitted = plain_error(self.graph, reader, found, list(self.left_out(reader)), self.gone) ** 0.5
        error, notices = self.fit(reader, found)
        entry.error, entry.output_error = error**0.5, self.output_error()
        self.notes += notices

    def determined(self, reader: Reader) -> bool:
        """Whether there are rows enough to fit a layer that has lost nothing itself, to what earlier ones have lost."""
        linear = isinstance(self.graph.model.get_submodule(reader.layer), nn.Linear)
        shapes = [self.graph.trace.slots[self.graph.trace.ops[use].result.slot].shape for use in reader.uses]
        # Outputs of one image: of a linear layer its rows, of a convolution its places.
        each = [shape[0] // self.graph.batch if linear else math.prod(shape[2:]) for shape in shapes]
        rows = self.images.seen() * sum(min(count, self.images.positions) for count in each)
        inputs = self.graph.model.get_parameter(f"{reader.layer}.weight")[0].numel()
        return self.reconstruct and rows >= 4 * inputs

    def _drop_inputs(self, reader: Reader) -> None:
        weight = self.graph.model.get_parameter(f"{reader.layer}.weight").detach()
        weight[:, torch.from_numpy(np.flatnonzero(self._sampled[reader.end][0])).to(weight.device)] = 0
