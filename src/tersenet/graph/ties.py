"""What several families of operators do to channels: tie them along an axis, or read them all."""

from __future__ import annotations

from torch import Tensor

from tersenet.graph.labels import End, IntArray, Labeller, Value, array_of, varying
from tersenet.graph.trace import Op


def collapse(run: Labeller, labels: Tensor, axes: list[int]) -> Tensor:
    """Tie all labels along `axes`; the same labels with the first ones in their place."""
    for axis in axes:
        first = labels.narrow(axis, 0, 1)
        everywhere = varying(labels)
        if axis in everywhere:
            run.merge(
                array_of(first.expand(labels.shape), everywhere).reshape(-1), array_of(labels, everywhere).reshape(-1)
            )
        labels = first.expand(labels.shape)
    return labels


def read_whole(run: Labeller, op: Op, value: Value, vector: IntArray, axis: int, argument: int = 0) -> None:
    """An operator without tensors of its own reads all channels: what is removed has to be zero there."""
    end = End("consume", op.place.module, (), axis, vector, [op.number], (), value.origin, vector, axis, argument)
    run.end(end)
