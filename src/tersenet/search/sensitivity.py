"""Accuracy against pruning rate, one layer at a time: where a network can be pruned, before anything is.

For every channel group and rate the channels that `magnitude` would remove are set to zero as it does that, filters,
biases and batch norms, the network is evaluated, and the weights are put back bit by bit.

Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv 1608.08710, section 3.2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tersenet.data.bundle import Data
from tersenet.environment import environment
from tersenet.errors import NotFiniteError
from tersenet.graph.budget import Rounding, kept_at, rank_locally
from tersenet.graph.compact import mask, silence
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.select import left_whole, select_groups
from tersenet.graph.units import ChannelGroup
from tersenet.methods.base import Context
from tersenet.methods.magnitude import Magnitude
from tersenet.models.open import Source, example_of
from tersenet.results import Accuracy
from tersenet.search.folder import PAGE, RESULT, Folder
from tersenet.search.images import Images, choose
from tersenet.search.page import render
from tersenet.search.result import LayerCurve, Point, Sensitivity
from tersenet.search.settings import Settings
from tersenet.train.evaluate import evaluate

OnEvent = Callable[[dict[str, Any]], None]


def analyse(
    source: Source,
    data: Data,
    settings: Settings,
    *,
    device: torch.device,
    out: Path | None,
    fresh: bool,
    on_event: OnEvent,
    command: str | None,
) -> Sensitivity:
    """Open the network, measure every point that is not known yet, and write the result. A module is changed in place
    while it runs, and is bit for bit what it was afterwards.

    Raises:
        TersenetError: settings that fit neither network nor data, or another analysis in `out`. Nothing was measured
            or written then.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = source.open(data.shape, data.classes, data.normalise).to(device)
    graph = ModelGraph(network, example_of(network, batch=2), settings.residual)
    groups = select_groups(graph, settings.include, settings.exclude)
    scores, notes = _scores(graph, groups, data, settings, device)
    images = choose(data, settings.split, settings.samples, settings.seed, device)
    request = {"model": source.name, "data": data.name, **settings.plain, "split": images.split}
    request |= {"weights": (Source(network).fingerprint or "")[:16], "images": images.checksum[:16]}
    folder = Folder(out, request, fresh=fresh)
    sweep = Sweep(graph, groups, scores, settings.rates, images, data, device, folder, on_event)
    baseline, layers = sweep.run()
    result = Sensitivity(
        tersenet=environment(str(device))["tersenet"],
        model=source.name,
        data=data.name,
        split=images.split,
        settings=settings.plain,
        macs=graph.macs(),
        baseline=baseline,
        layers=layers,
        skipped=left_whole(graph, groups),
        notes=[*notes, *_remarks(graph, groups, images, baseline), *_lost(layers)],
        environment=environment(str(device)),
        command=command,
    )
    folder.write(RESULT, result.model_dump_json(indent=1) + "\n")
    folder.write(PAGE, render(result))
    return result


@dataclass
class Sweep:
    """Every group at every rate. What `folder` knows is not measured again."""

    graph: ModelGraph
    groups: list[ChannelGroup]
    scores: dict[str, NDArray[np.float64]]
    rates: tuple[float, ...]
    images: Images
    data: Data
    device: torch.device
    folder: Folder
    on_event: OnEvent
    seconds: list[float] = field(default_factory=list[float])

    def run(self) -> tuple[Accuracy, list[LayerCurve]]:
        """The whole network's accuracy, and a curve per group."""
        total = len(self.groups) * len(self.rates)
        done = sum((group.name, rate) in self.folder.known for group in self.groups for rate in self.rates)
        baseline = self.folder.known.get((None, 0.0))
        if baseline is None:
            baseline = self._evaluate()
            self.folder.add(None, 0.0, baseline)
        start = {"layers": len(self.groups), "rates": len(self.rates), "images": self.images.n}
        self.on_event({"event": "start", **start, "done": done, "of": total, "eta_seconds": self._eta(total - done)})
        curves: list[LayerCurve] = []
        for group in self.groups:
            # Small layers lose as many channels at one rate as at the next.
            seen: dict[int, Accuracy | None] = {group.size: baseline}
            points: list[Point] = []
            for rate in self.rates:
                kept = kept_at(rank_locally({group.name: self.scores[group.name]}), rate, Rounding())
                left = len(kept[group.name])
                if (group.name, rate) not in self.folder.known:
                    accuracy, problem = (seen[left], None) if left in seen else self._masked(group, kept)
                    self.folder.add(group.name, rate, accuracy)
                    done += 1
                    point = {
                        "layer": group.name,
                        "rate": rate,
                        **(accuracy.model_dump() if accuracy is not None else {}),
                        "problem": problem,
                        "done": done,
                        "of": total,
                        "last": rate == self.rates[-1],
                    }
                    self.on_event({"event": "point", **point, "eta_seconds": self._eta(total - done)})
                accuracy = seen[left] = self.folder.known[group.name, rate]
                points.append(
                    Point(rate=rate, removed=group.size - left, macs=self.graph.macs(kept), accuracy=accuracy)
                )
            curves.append(
                LayerCurve(
                    name=group.name,
                    producers=list(group.producers),
                    channels=group.size,
                    macs_share=self._macs_share(group),
                    points=points,
                )
            )
        return baseline, curves

    def _masked(self, group: ChannelGroup, kept: Kept) -> tuple[Accuracy | None, str | None]:
        """The accuracy without some channels; where it is not finite none, and why."""
        with masked(self.graph, group, kept):
            try:
                return self._evaluate(), None
            except NotFiniteError as error:
                return None, str(error)

    def _evaluate(self) -> Accuracy:
        began = time.monotonic()
        found = evaluate(
            self.graph.model, self.images, device=self.device, loss=self.data.loss, metric=self.data.metric
        )
        self.seconds.append(time.monotonic() - began)
        return found

    def _eta(self, points: int) -> float | None:
        return points * sum(self.seconds) / len(self.seconds) if self.seconds else None

    def _macs_share(self, group: ChannelGroup) -> float:
        shares = np.ones(int(self.graph.units.of.max()) + 1)
        whole = self.graph.macs_of(shares)
        shares[group.units] = 0
        return 1 - self.graph.macs_of(shares) / whole


@contextmanager
def masked(graph: ModelGraph, group: ChannelGroup, kept: Kept) -> Generator[None]:
    """The network without what `kept` leaves out of this group; afterwards every weight is bit for bit what it was."""
    ends = [graph.ends[member.end] for member in group.members]
    names = {name for end in ends if end.role != "consume" for name in end.tensors}
    before = {name: graph.tensor(name).detach().clone() for name in names}
    try:
        mask(graph, kept)
        silence(graph, group, graph.removed(kept))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                graph.tensor(name).copy_(tensor)


def _scores(
    graph: ModelGraph, groups: list[ChannelGroup], data: Data, settings: Settings, device: torch.device
) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """What `magnitude` would go by, and its notes."""
    method = Magnitude.model_validate({"score": settings.importance, "batches": settings.batches})
    context = Context(device=device, seed=settings.seed, data=data)
    return method.scores(graph, groups, context), context.notes


def _lost(layers: list[LayerCurve]) -> list[str]:
    names = [f"{layer.name} at {point.rate:g}" for layer in layers for point in layer.points if point.accuracy is None]
    return [f"loss or metric not finite, which counts as all lost: {', '.join(names)}"] if names else []


def _remarks(graph: ModelGraph, groups: list[ChannelGroup], images: Images, baseline: Accuracy) -> list[str]:
    notes: list[str] = []
    if baseline.top1 is not None:
        notes.append(f"{images.n:,} {images.split} images: one of them is {100 / images.n:.2g} points of top-1")
    if images.split == "train":
        notes.append("training images: the network knows them, and new ones may lose more")
    of = graph.units.of
    units = {int(unit) for statistic in graph.found.statistics for unit in of[statistic.labels]}
    normed = [group.name for group in groups if not units.isdisjoint(group.units.tolist())]
    if normed:
        counted = "means over channels count the zeroed ones here, and leave them out once they are gone"
        notes.append(f"{', '.join(normed)}: {counted}")
    return notes
