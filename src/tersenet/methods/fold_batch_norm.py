"""Batch norms as part of the convolutions before them, for good. The outputs in evaluation mode are the same.

Source: He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168, whose
program folds before it prunes. Here that is not needed: `channel_pruning` fits layers behind their batch norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tersenet.methods.base import Context, Method

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph


_TOLERANCE = 1e-4
"""Of the largest output, in float32: products of weights and scales are rounded once more."""


class FoldBatchNorm(Method):
    """Put every batch norm that alone reads a convolution into its weight and bias."""

    method: ClassVar[str] = "fold_batch_norm"

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Restores the network if the folded one does not give the same."""
        from tersenet.graph.edits import Fold
        from tersenet.graph.folding import foldable
        from tersenet.graph.proven import apply_equal

        graph = graph.with_residual("coupled")
        pairs = foldable(graph)
        if not pairs:
            context.notes.append("nothing to fold: no batch norm alone reads a plain convolution")
            return
        edits = [Fold(module=conv, norm=norm) for conv, norm in pairs]
        context.equality = apply_equal(graph, edits, "folded", _TOLERANCE)
        context.notes.append(f"{len(pairs)} batch norms are part of their convolutions now")
