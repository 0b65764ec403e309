"""Which convolutions have a 1 x 1 one right behind them that they can be one with."""

from __future__ import annotations

from torch import nn

from tersenet.graph.convolutions import has_hooks
from tersenet.graph.model import ModelGraph
from tersenet.graph.shrink import all_names
from tersenet.graph.trace import refs_in
from tersenet.nn.low_rank import not_mergeable


def mergeable(graph: ModelGraph) -> list[tuple[str, str]]:
    """Pairs of plain convolutions, the second alone reading what the first makes, that one layer costs no more than.
    Neither has hooks, which would see other tensors or be lost.

    In a row of more than two, those at its end are merged first, and each layer is in one pair.
    """
    trace, names = graph.trace, all_names(graph.model)
    runs: dict[str, list[int]] = {}
    for op in trace.ops:
        runs.setdefault(op.place.module, []).append(op.number)
    outputs = set(refs_in(trace.outputs))
    found: list[tuple[str, str]] = []
    taken: set[str] = set()
    for op in reversed(trace.ops):
        readers = trace.readers.get(op.result, []) if op.name == "convolution" else []
        if len(readers) != 1 or readers[0].name != "convolution" or op.result in outputs:
            continue
        pair = op.place.module, readers[0].place.module
        layers = [graph.model.get_submodule(name) for name in pair]
        alone = all(len(runs[name]) == 1 and len(names.get(f"{name}.weight", ())) == 1 for name in pair)
        if readers[0].args[0] != op.result or not alone or taken & {*pair}:
            continue
        first, second = layers
        if has_hooks(first) or has_hooks(second):
            continue
        if type(first) is nn.Conv2d and type(second) is nn.Conv2d and not_mergeable(first, second) is None:
            found.append(pair)
            taken |= {*pair}
    return found[::-1]
