"""From solved to small: channels that are zero everywhere and inputs that nobody reads are cut, by edits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tersenet.errors import GraphError
from tersenet.graph.compact import compact
from tersenet.graph.copies import copied
from tersenet.graph.edits import Adapt, Attribute, Keep, Slice
from tersenet.graph.labels import IntArray
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.proof import compare
from tersenet.graph.shrink import all_names
from tersenet.results import Equality


def cut(graph: ModelGraph, kept: Kept, sampled: Mapping[str, IntArray]) -> Equality:
    """Remove all but `kept` of the channel groups and let each layer of `sampled` read only these of its inputs.

    Returns the largest difference between the network as it was and as it is, of both parts.

    Raises:
        GraphError: a compact network that would not equal the masked one.
    """
    equality = compact(graph, kept, "zero").equality if kept else None
    if not sampled:
        assert equality is not None
        return equality
    whole = copied(graph.model)
    for layer, places in sampled.items():
        keep = tuple(int(place) for place in places)
        weight = graph.model.get_parameter(f"{layer}.weight")
        if weight.shape[1] == len(keep):
            continue
        # What is not read counts for nothing: the solver has made these weights zero; a dry run does it here.
        for network in (whole, graph.model):
            _zero_others(network.get_parameter(f"{layer}.weight"), keep)
        names = tuple(all_names(graph.model)[f"{layer}.weight"])
        size = Attribute(module=layer, name="in_channels", value=len(keep))
        graph.apply(Keep(group=layer, slices=(Slice(tensors=names, axis=1, keep=keep),), attributes=(size,)))
        graph.apply(Adapt(module=layer, gather=keep))
    second = compare(whole, graph.model, graph.example)
    if not second.relative <= second.tolerance:
        raise GraphError(
            f"the network with sampled inputs differs by {second.relative:.2g} of the largest output (allowed "
            f"{second.tolerance:.0e}); use residual: coupled"
        )
    return max([second, *([equality] if equality is not None else [])], key=lambda e: e.relative)


def _zero_others(weight: Tensor, keep: tuple[int, ...]) -> None:
    others = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    others[list(keep)] = False
    weight.detach()[:, others] = 0
