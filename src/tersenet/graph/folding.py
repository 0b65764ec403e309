"""Which convolutions have a batch norm right behind them that can go into them."""

from __future__ import annotations

from collections import Counter

from torch import nn

from tersenet.graph.convolutions import has_hooks
from tersenet.graph.model import ModelGraph
from tersenet.graph.shrink import all_names
from tersenet.graph.trace import refs_in
from tersenet.nn.batch_norm_fold import not_foldable


def foldable(graph: ModelGraph) -> list[tuple[str, str]]:
    """Plain convolutions and the plain batch norms that alone read them; each runs once, under its own weight, and has
    no hooks, which would see other tensors or be lost."""
    trace, names = graph.trace, all_names(graph.model)
    runs = Counter((op.place.module, op.name) for op in trace.ops)
    outputs = set(refs_in(trace.outputs))
    found: list[tuple[str, str]] = []
    for op in trace.ops:
        readers = trace.readers.get(op.result, []) if op.name == "convolution" else []
        if len(readers) != 1 or readers[0].name != "native_batch_norm" or op.result in outputs:
            continue
        pair = op.place.module, readers[0].place.module
        conv, norm = (graph.model.get_submodule(name) for name in pair)
        if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or not_foldable(conv, norm) is not None:
            continue
        if has_hooks(conv) or has_hooks(norm):
            continue
        tensors = [f"{pair[0]}.weight", f"{pair[1]}.running_mean"]
        once = runs[pair[0], "convolution"] == runs[pair[1], "native_batch_norm"] == 1
        if once and all(len(names.get(name, ())) == 1 for name in tensors):
            found.append(pair)
    return found
