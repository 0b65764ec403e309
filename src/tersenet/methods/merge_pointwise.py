"""A convolution and the 1 x 1 one right behind it as one, where that costs no more. The outputs are the same.

Source: He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168: what
their 3C does after its channel decomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tersenet.errors import GraphError
from tersenet.methods.base import Context, Method

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph


class MergePointwise(Method):
    """Make one convolution of two where the second is 1 x 1, nothing is between them, and one costs no more."""

    method: ClassVar[str] = "merge_pointwise"

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Restores the network if the merged one does not give the same."""
        from tersenet.graph.copies import copied
        from tersenet.graph.edits import Merge
        from tersenet.graph.merging import mergeable
        from tersenet.graph.proof import compare
        from tersenet.graph.undo import structure_of

        graph = graph.with_residual("coupled")
        pairs = mergeable(graph)
        if not pairs:
            context.notes.append("nothing to merge: no 1x1 convolution right behind another makes one layer cheaper")
            return
        whole, restore, record = copied(graph.model), structure_of(graph.model), graph.record
        try:
            for first, second in pairs:
                graph.apply(Merge(first=first, second=second))
            equality = compare(whole, graph.model, graph.example)
            if not equality.relative <= equality.tolerance:
                raise GraphError(
                    f"the network with merged layers differs by {equality.relative:.2g} of the largest output (allowed "
                    f"{equality.tolerance:.0e}); nothing was merged"
                )
        except BaseException:
            restore()
            graph.forget(record)
            raise
        context.equality = equality
        context.notes += [f"{first} and {second} are one layer now" for first, second in pairs]
