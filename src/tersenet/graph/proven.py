"""Edits that must not change what a network computes: applied, compared, and taken back if they did."""

from __future__ import annotations

from collections.abc import Sequence

from tersenet.errors import GraphError
from tersenet.graph.copies import copied
from tersenet.graph.edits import Edit
from tersenet.graph.model import ModelGraph
from tersenet.graph.proof import compare
from tersenet.graph.undo import graph_state_of
from tersenet.results import Equality


def apply_equal(graph: ModelGraph, edits: Sequence[Edit], done: str, tolerance: float = 0.0) -> Equality:
    """Apply all edits.

    Args:
        done: what happened to the layers, for a message.
        tolerance: of the largest output, where more than the usual one is to be allowed.

    Raises:
        GraphError: an edit that does not fit, or a network that gives something else. It is then as it was.
    """
    whole, undo = copied(graph.model), graph_state_of(graph)
    try:
        for edit in edits:
            graph.apply(edit)
        equality = compare(whole, graph.model, graph.example)
        equality = equality.model_copy(update={"tolerance": max(equality.tolerance, tolerance)})
        if not equality.relative <= equality.tolerance:
            raise GraphError(
                f"the network with {done} layers differs by {equality.relative:.2g} of the largest output (allowed "
                f"{equality.tolerance:.0e}); nothing was {done}"
            )
    except BaseException:
        undo()
        raise
    return equality
