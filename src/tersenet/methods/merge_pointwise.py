"""A convolution and the 1 x 1 one right behind it as one, where that costs no more. The outputs are the same.

Source: He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168: what
their 3C does after its channel decomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tersenet.methods.base import Context, Method

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph


class MergePointwise(Method):
    """Make one convolution of two where the second is 1 x 1, nothing is between them, and one costs no more."""

    method: ClassVar[str] = "merge_pointwise"

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Restores the network if the merged one does not give the same."""
        from tersenet.graph.edits import Merge
        from tersenet.graph.merging import mergeable
        from tersenet.graph.proven import apply_equal

        graph = graph.with_residual("coupled")
        pairs = mergeable(graph)
        if not pairs:
            context.notes.append("nothing to merge: no 1x1 convolution right behind another makes one layer cheaper")
            return
        edits = [Merge(first=first, second=second) for first, second in pairs]
        context.equality = apply_equal(graph, edits, "merged")
        context.notes += [f"{first} and {second} are one layer now" for first, second in pairs]
