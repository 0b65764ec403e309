"""Make a masked network compact: remove the filters whose weights are all zero, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tersenet.methods.base import Context, Method

if TYPE_CHECKING:
    from tersenet.graph.model import Kept, ModelGraph


class RemoveZeroFilters(Method):
    """For checkpoints of soft or hard pruning from elsewhere, which hold zeros in place of a smaller architecture.

    What the zeros still emit through biases and batch norm is compensated, so the outputs stay what they were.

    Source: `get_small_model` of the Soft Filter Pruning code, IJCAI 2018.
    Differs: any network that the graph can trace; the constants of every batch norm, not only of a block's last.
    """

    method: ClassVar[str] = "remove_zero_filters"

    residual: Literal["independent", "coupled"] = "independent"
    """`independent`: each block loses its own zeros. `coupled`: a trunk loses a channel where all that write to it are
    zero."""
    constants: Literal["auto", "exact", "zero"] = "auto"
    """What batch norm emits for removed filters: compensated exactly, silenced (`zero`), or exact where possible."""

    def apply(self, graph: ModelGraph, context: Context) -> None:
        from tersenet.graph.compact import compact

        graph = graph.with_residual(self.residual)
        kept = _nonzero(graph)
        removed = sum(graph.group(name).size - len(places) for name, places in kept.items())
        context.masked = context.evaluate()
        done = compact(graph, kept, self.constants)
        context.equality = done.equality
        context.notes.append(f"{removed} zero filters in {len(kept)} channel groups were removed")
        if done.zeroed:
            context.notes.append(f"batch norm of the removed filters of {', '.join(done.zeroed)} was silenced")


def _nonzero(graph: ModelGraph) -> Kept:
    """The units of every group that has some zero filters, but at least one unit."""
    import numpy as np

    kept: Kept = {}
    for group in graph.groups:
        if group.frozen:
            continue
        alive = graph.alive(group)
        alive[0] |= not bool(alive.any())
        if not bool(alive.all()):
            kept[group.name] = np.flatnonzero(alive.numpy())
    return kept
