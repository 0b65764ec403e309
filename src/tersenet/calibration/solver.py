"""A network's channels chosen and its layers fitted one after another, in the order in which they run.

The network keeps its shape while that is done: removed channels are zero everywhere. Cutting them comes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.calibration.choose import Choice, Selection, choose
from tersenet.calibration.items import Counts, Item
from tersenet.calibration.readers import Reader, units_read
from tersenet.calibration.refit import plain_error, refit
from tersenet.calibration.sampling import Images, Statistics, Targets, statistics
from tersenet.data.bundle import first_tensor
from tersenet.data.order import generator
from tersenet.graph.compact import mask, silence
from tersenet.graph.labels import IntArray, NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.precision import full_float32
from tersenet.graph.replay import over_kept, replay
from tersenet.graph.trace import running, tensors_in
from tersenet.train import distributed
from tersenet.train.batch import forward

_PROBE = 128  # images on which outputs are compared


@dataclass
class Solver:
    """`graph` has the network that is worked on. As it is when this is made, it says what is wanted."""

    graph: ModelGraph
    images: Images
    selection: Selection
    reconstruct: bool
    gone: NDArrayBool = field(init=False)
    kept: dict[str, IntArray] = field(default_factory=dict[str, IntArray])
    notes: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.gone = np.zeros(int(self.graph.units.of.max()) + 1, dtype=bool)
        self._sampled: dict[int, NDArrayBool] = {}
        self._targets: Targets | None = None
        self._probe = self._first_images()
        self._wanted = self._run(self.graph.model)

    def run(self, items: Sequence[Item], readers: Sequence[Reader], left: Counts) -> None:
        """Remove all but `left` units of every item. Fit every layer that has lost inputs, and all behind the first
        loss for which there are rows enough."""
        if self.selection == "lasso" or self.reconstruct:
            self._targets = Targets(self.graph, readers, self.images)
        shrinking = [item for item in items if left[item.name] < item.size]
        for item in shrinking:
            if not item.readers:
                self.remove(item, self.choice(item, {}), left[item.name])
        for reader in readers:
            waiting = [i for i in shrinking if reader in i.readers and i.name not in self.kept]
            known: dict[int, Statistics] = {}
            if waiting and (self.selection == "lasso" or self.reconstruct):
                wanted = {r.end: r for item in waiting for r in item.readers}
                known = self.statistics(list(wanted.values()) if self.selection == "lasso" else [reader])
            for item in waiting:
                self.remove(item, self.choice(item, known), left[item.name])
            if self.left_out(reader).any() or (self.kept and self._determined(reader)):
                self._fit(reader, known if len(known) == 1 else {}, waiting)

    def choice(self, item: Item, known: dict[int, Statistics]) -> Choice:
        drawn = generator("channels", self.images.seed, item.name)
        return choose(self.graph, item, known, self.selection, self.gone, drawn)

    def statistics(self, readers: Sequence[Reader]) -> dict[int, Statistics]:
        """Of the network as it is and of what is wanted of it; before the run, that is what it gives."""
        return statistics(self.graph, self._targets, readers, self.images, self.gone)

    def remove(self, item: Item, choice: Choice, count: int) -> None:
        """Zero what is not kept of an item. Every process removes what the first one chose."""
        places = choice.kept(count).cpu()
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
    def trial(self, item: Item) -> Generator[None]:
        """What is done to an item inside is undone afterwards."""
        tensors = [t for reader in item.readers for t in self.tensors(reader)]
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
        """How far the outputs are from the original's: the mean divergence of their softmax for logits (N, C), else
        the share of their variance that is missed."""
        now = self._run(self.graph.model)
        classes = len(now) == 1 and now[0].dim() == 2 and now[0].shape[1] > 1
        if classes:
            p, q = F.log_softmax(self._wanted[0], 1), F.log_softmax(now[0], 1)
            return float((p.exp() * (p - q)).sum(1).mean())
        return self.output_error() ** 2

    def output_error(self) -> float:
        """The difference of the outputs from the original's, as a share of their deviation (root mean square)."""
        now = self._run(self.graph.model)
        missed = sum(float((a - b).square().sum()) for a, b in zip(now, self._wanted, strict=True))
        whole = sum(float((b - b.mean(0)).square().sum()) for b in self._wanted)
        return (missed / max(whole, 1e-30)) ** 0.5

    def _fit(self, reader: Reader, known: dict[int, Statistics], waiting: list[Item]) -> None:
        lost, whole = int(self.left_out(reader).sum()), self.left_out(reader).size
        if not self.reconstruct:
            self.notes.append(f"{reader.layer}: {whole - lost} of {whole} inputs left, weights as they were")
            return
        # A mean over channels, such as a layer norm's, has changed with those that went since then.
        found = known.get(reader.end) if waiting and not self.graph.found.statistics else None
        found = self.statistics([reader])[reader.end] if found is None else found
        before = plain_error(self.graph, reader, found, list(self.left_out(reader)), self.gone)
        error, notices = self.fit(reader, found)
        self.notes.append(
            f"{reader.layer}: {whole - lost} of {whole} inputs left, response error {error**0.5:.2%} "
            f"({before**0.5:.2%} before the fit), error of the network's output {self.output_error():.2%}"
        )
        self.notes += notices

    def _determined(self, reader: Reader) -> bool:
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

    def _first_images(self) -> list[tuple[Any, ...]]:
        probe: list[tuple[Any, ...]] = []
        left = _PROBE
        for batch in self.images.batches():
            probe.append(tuple(x[:left] for x in batch))
            left -= len(first_tensor(batch))
            if left <= 0:
                break
        return probe

    def _run(self, model: nn.Module) -> list[Tensor]:
        with running(model), full_float32():
            actions = over_kept(self.graph, self.gone)
            outputs = [
                tensors_in(replay(model, self.graph.trace, batch, actions) if actions else forward(model, batch))
                for batch in self._probe
            ]
        floating = [[x.detach().double() for x in batch if x.is_floating_point()] for batch in outputs]
        return [torch.cat(parts) for parts in zip(*floating, strict=True)]
