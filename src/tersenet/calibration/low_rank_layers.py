"""The convolutions that can be split in two of lower rank, what each rank costs, and why others stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tersenet.calibration.items import Counts
from tersenet.calibration.readers import Reader, find_readers
from tersenet.errors import GraphError
from tersenet.graph.convolutions import has_hooks, tags
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import Layers, check_patterns, matches_any
from tersenet.graph.shrink import shares_weight
from tersenet.nn.low_rank import Form, highest_rank


@dataclass(frozen=True)
class Splittable:
    """A convolution (O, C, kh, kw) and what it costs per image: whole, and for each rank of a pair in its place.

    Ranks that save something are 1 to `size` - 1; `size` stands for the whole layer.
    """

    reader: Reader
    size: int
    macs: int
    macs_each: int
    params: int
    params_each: int

    @property
    def name(self) -> str:
        return self.reader.layer

    def cost(self, kind: str, rank: int) -> int:
        """MACs or parameters at a rank; the bias is left out."""
        whole, each = (self.macs, self.macs_each) if kind == "macs" else (self.params, self.params_each)
        return whole if rank >= self.size else rank * each

    def rank_at(self, rate: float) -> int:
        """The highest rank that costs at most 1 - `rate` of the MACs; `size` for a rate of 0."""
        rank = int((1 - rate) * self.macs / self.macs_each + 1e-9)
        return self.size if rate == 0 else min(max(1, rank), self.size)


@dataclass(frozen=True)
class Candidates:
    """`chosen` in the order in which they run; `left` is layer -> the reason why it stays whole."""

    chosen: tuple[Splittable, ...]
    left: dict[str, str]
    names: Layers

    def notes(self) -> list[str]:
        """One line for each reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        return [
            f"{', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''} left whole: {why}"
            for why, names in reasons.items()
        ]


class RankCosts:
    """MACs or parameters of the network for ranks of its layers, for `allocation`."""

    way_out = "Include more layers (`exclude: []` takes the first), or leave multiple at 1; channel_pruning goes lower"

    def __init__(self, graph: ModelGraph, layers: Sequence[Splittable], kind: str) -> None:
        self.items = layers
        self.kind = kind
        total = graph.macs() if kind == "macs" else graph.params()
        self._rest = total - sum(layer.cost(kind, layer.size) for layer in layers)

    def __call__(self, left: NDArray[np.int64]) -> int:
        return self._rest + sum(layer.cost(self.kind, int(rank)) for layer, rank in zip(self.items, left, strict=True))


def find_splittable(
    graph: ModelGraph, form: Form, include: Sequence[str], exclude: Sequence[str] | None, pointwise: bool
) -> Candidates:
    """The convolutions that are included, not excluded, and for which some rank saves MACs and parameters.

    `exclude` None leaves out the first one that runs. `pointwise`: 1x1 convolutions too, in two of 1x1.

    Raises:
        UnknownNameError: a pattern that matches no convolution.
        GraphError: there are such layers, but all are excluded.
    """
    readers, others = find_readers(graph)
    reasons = {graph.ends[end].layer: why for end, why in others.items()}
    convolutions = {n: m for n, m in graph.model.named_modules() if isinstance(m, nn.Conv2d)}
    in_order = [r.layer for r in readers if r.layer in convolutions]
    names = tags({n: convolutions[n] for n in dict.fromkeys([*in_order, *convolutions])})
    if convolutions:
        check_patterns([*include, *(exclude or ())], list(convolutions))
    by_layer = {reader.layer: reader for reader in readers}
    chosen: list[Splittable] = []
    left: dict[str, str] = {}
    excluded = False
    for name, known in names.items():
        reader = by_layer.get(name)
        why = _form_hindrance(convolutions[name], form, pointwise)
        if why is None and reader is not None:
            why = _hindrance(graph, reader)
        if why is not None or reader is None:
            left[name] = why or reasons.get(name, "it does not run, or its channels are not known")
            continue
        layer = _splittable(graph, reader, form)
        if layer.size < 2:
            left[name] = "no rank would save anything"
        elif exclude is None and "position:first" in known:
            left[name] = "the first layer costs little (`exclude: []` takes it)"
        elif matches_any(known, exclude or ()) or not matches_any(known, include):
            left[name], excluded = "by include or exclude", True
        else:
            chosen.append(layer)
    if excluded and not chosen:
        raise GraphError("no layer is left to split: include and exclude leave none of those that can be")
    return Candidates(tuple(chosen), left, names)


def ranks_of(
    found: Candidates, rate: float | None, ranks: Mapping[str, int], multiple: int
) -> tuple[Counts, list[str]]:
    """Layer -> the rank that is given for it, and what is to be said of it.

    The first pattern of `ranks` that matches counts, then the rate. A rank that saves nothing leaves a layer whole.

    Raises:
        UnknownNameError: a pattern that matches no convolution.
    """
    if found.names:
        check_patterns(ranks, list(found.names))
    given: Counts = {}
    notes: list[str] = []
    for layer in found.chosen:
        named = next((r for pattern, r in ranks.items() if matches_any(found.names[layer.name], [pattern])), None)
        if named is not None:
            given[layer.name] = min(named, layer.size)
            if named >= layer.size:
                notes.append(f"{layer.name} left whole: rank {named} saves nothing, only ranks below {layer.size} do")
        elif rate is not None:
            rank = layer.rank_at(rate)
            given[layer.name] = rank if rank == layer.size else max(1, rank // multiple) * multiple
    return given, notes


def _form_hindrance(conv: nn.Conv2d, form: Form, pointwise: bool) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, which computes in a way of its own"
    if conv.groups > 1:
        return "it is grouped or depthwise"
    if form == "spatial" and min(conv.kernel_size) == 1:
        return f"its kernel {conv.kernel_size[0]}x{conv.kernel_size[1]} has one axis only"
    if max(conv.kernel_size) == 1 and not pointwise:
        return "it is 1x1 (`pointwise: true` takes it)"
    return None


def _hindrance(graph: ModelGraph, reader: Reader) -> str | None:
    conv = graph.model.get_submodule(reader.layer)
    if any(graph.trace.ops[use].place.module != reader.layer for use in reader.uses):
        return "other code than its own forward runs it"
    if has_hooks(conv):
        return "it has hooks, which a pair would lose"
    return "it shares its weight with another layer" if shares_weight(graph.model, reader.layer) else None


def _splittable(graph: ModelGraph, reader: Reader, form: Form) -> Splittable:
    weight = graph.model.get_parameter(f"{reader.layer}.weight")
    outputs, channels, height, width = weight.shape
    if form == "spatial":
        first, second = channels * height, outputs * width
    else:
        first, second = weight[0].numel(), outputs
    macs, each = 0, 0
    for use in reader.uses:
        op, argument = graph.trace.ops[use], graph.ends[reader.end].reads_argument
        made = prod(graph.trace.slots[op.result.slot].shape[2:])
        # The vertical convolution has strided the height, and not yet the width.
        between = graph.trace.slots[op.result.slot].shape[2] * graph.trace.slots[op.args[argument].slot].shape[3]
        macs += made * weight.numel()
        each += (between if form == "spatial" else made) * first + made * second
    saving = min((macs - 1) // each, (weight.numel() - 1) // (first + second), highest_rank(weight, form))
    return Splittable(reader, saving + 1, macs, each, weight.numel(), first + second)
