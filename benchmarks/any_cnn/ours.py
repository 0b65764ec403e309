"""tersenet on one network: trace, group, prune half of every group by L2 norm, and check the result from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.any_cnn.subjects import Subject, build, cost, difference, outputs, traits
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.graph.compact import compact
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.replay import Action, over_kept, replay
from tersenet.graph.trace import Trace

RATE = 0.5
EXACT = 1e-9
"""Relative error in float64 up to which the compact network counts as computing what the masked one does."""

Cut = tuple[str, str, bool, int, Tensor]
"""Group, tensor, whether it makes the channels, axis, indices that go."""


@dataclass(frozen=True)
class Masks:
    """What the masked network needs: which parts of which tensors go, and the norms whose statistics change."""

    network: str
    cuts: list[Cut]
    trace: Trace
    statistics: dict[int, Action]


def prune(name: str) -> Iterator[dict[str, Any]]:
    """What was found, bit by bit, so that a time limit loses only the rest."""
    subject = build(name)
    before = cost(subject)
    yield {
        "size": subject.size,
        "traced_size": subject.small,
        "before": {key: before[key] for key in ("macs", "params")},
        **traits(subject, before["operators"]),
    }
    try:
        yield from _pruned(subject)
    except TersenetError as error:
        yield {"result": "refused", "reason": one_line(error)}


def _pruned(subject: Subject) -> Iterator[dict[str, Any]]:
    graph = ModelGraph(subject.model, subject.example(subject.small))
    groups = graph.groups
    yield frozen(graph)
    if all(g.frozen for g in groups):
        raise TersenetError("nothing can be removed")
    kept = weakest_removed(graph)
    # Noted before `compact` changes the graph.
    masks = Masks(subject.name, cuts(graph, kept), graph.trace, over_kept(graph, graph.removed(kept)))
    shapes = {name: tensor.shape for name, tensor in subject.model.state_dict().items()}
    done = compact(graph, kept, constants="auto")
    yield {"silenced": len(done.zeroed)}
    after = cost(subject)
    yield {"after": {key: after[key] for key in ("macs", "params")}}
    error = check(subject, masks, done.zeroed)
    changed = any(shapes.get(name) != tensor.shape for name, tensor in subject.model.state_dict().items())
    result = "nothing removed" if not changed else "exact" if error <= EXACT else "different"
    yield {"error": error, "kept_statistics": len(masks.statistics), "result": result}


def weakest_removed(graph: ModelGraph) -> Kept:
    """The half of every free group with the largest L2 norm over all filters that make a unit."""
    kept: Kept = {}
    for group in graph.groups:
        if group.frozen or group.size < 2:
            continue
        square = torch.zeros(group.size, dtype=torch.float64)
        for weight, axis, places in graph.filters(group):
            filters = torch.linalg.vector_norm(weight.detach().movedim(axis, 0).flatten(1).double(), dim=1).square()
            square += filters[torch.from_numpy(places)].sum(1)
        order = torch.argsort(square, descending=True, stable=True)
        kept[group.name] = np.sort(order[: group.size - int(group.size * RATE)].numpy())
    return kept


def frozen(graph: ModelGraph) -> dict[str, Any]:
    """Groups and units, how many are free, and why the others are not, by units."""
    groups = graph.groups
    reasons: Counter[str] = Counter()
    for group in groups:
        if group.frozen:
            reasons[group.frozen] += group.size
    units = sum(g.size for g in groups)
    free = units - sum(reasons.values())
    return {"groups": len(groups), "units": units, "free": free / max(units, 1), "frozen": reasons.most_common(20)}


def check(subject: Subject, masks: Masks, silenced: list[str]) -> float:
    """Compact against masked, on images that neither tracing nor pruning has seen."""
    # A replay needs the very operators of the trace, and two images may take others than one.
    batch = 1 if subject.kind == "detection" or masks.statistics else 2
    example = subject.example(subject.small, batch, seed=1)
    compacted = outputs(subject.model, example)
    return difference(masked_outputs(masks, silenced, example), compacted)


def masked_outputs(masks: Masks, silenced: list[str], example: tuple[Any, ...]) -> list[Tensor]:
    """The reference: the network built anew, the removed filters zero; in silenced groups also biases and norms.

    Norms that take their mean and variance over channels take them over the kept ones.
    """
    model = build(masks.network).model
    state = dict([*model.named_parameters(), *model.named_buffers()])
    for group, tensor, filters, axis, index in masks.cuts:
        if filters or group in silenced:
            state[tensor].detach().index_fill_(axis, index, 0)
    if not masks.statistics:
        return outputs(model, example)
    return outputs(model, example, lambda *inputs: replay(model, masks.trace, inputs, masks.statistics))


def cuts(graph: ModelGraph, kept: Kept) -> list[Cut]:
    found: list[Cut] = []
    for name, places in kept.items():
        group = graph.group(name)
        removed = np.setdiff1d(np.arange(group.size), places)
        for member in group.members:
            end = graph.ends[member.end]
            index = torch.from_numpy(member.places[removed].reshape(-1))
            for number, tensor in enumerate(end.tensors if end.role != "consume" else ()):
                if "running" not in tensor:
                    axis = end.axis if end.axis < graph.tensor(tensor).dim() else 0
                    found.append((name, tensor, end.role == "produce" and number == 0, axis, index))
    return found


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return (text if isinstance(error, TersenetError) else f"{type(error).__name__}: {text}")[:300]
