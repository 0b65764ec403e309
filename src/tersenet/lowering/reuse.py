"""Sums in place: a layer may write its result over the residual that it adds, where nobody reads that any more.

Memory that was just read is written at once; other memory has to be brought into the cache first. For the last 1x1
convolution of a bottleneck that is a third of its time.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tersenet.lowering.layers import AnyLayer
from tersenet.lowering.program import is_fresh


def with_reuse(made: fx.GraphModule, layers: dict[str, AnyLayer]) -> dict[str, AnyLayer]:
    """`layers` with `reuse` set where the residual of the module `layers` names is free."""
    place = {node: number for number, node in enumerate(made.graph.nodes)}
    found = dict(layers)
    for node, number in place.items():
        if node.op == "call_module" and node.target in layers and len(node.args) == 2:
            residual = node.args[1]
            assert isinstance(residual, fx.Node)
            others = [user for user in residual.users if user is not node]
            # A reader whose result shares memory with what it reads would pass the change on.
            if _has_own_memory(residual) and all(place[one] < number and _has_own_memory(one) for one in others):
                found[str(node.target)] = replace(layers[str(node.target)], reuse=node.args[0] is not residual)
    return found


def _has_own_memory(node: fx.Node) -> bool:
    return node.op == "call_module" or is_fresh(node)
