"""Second moments of what layers read and should put out, over seeded calibration images and positions.

The inputs come from the network as it is, the wanted outputs from the original one on the same images and positions:
what earlier layers lost is part of what a later one can make up for. Where a residual sum follows, the wanted output
also makes up for what the other operand has lost.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, sections 3.2 and 3.3.
Differs: what is stored are sampled rows; each pass runs the network as far as it has to. Targets are taken
behind the batch norm that follows a layer, so that errors count by what they become there, and scales near zero do no
harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from tersenet.calibration.images import Images
from tersenet.calibration.original import Original
from tersenet.calibration.readers import Reader, through_norm
from tersenet.calibration.resume import Resumed
from tersenet.calibration.seen import Places, Seen
from tersenet.calibration.store import Store
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import over_kept
from tersenet.ops.gram import Moments

_Wanted = tuple[Reader, Reader, Tensor | None]
"""A layer, the one that says what it should give (the layer itself, or one of another network), and which outputs."""

Statistics = list[Moments]
"""One for each group of a convolution, of all its outputs."""


def statistics(
    graph: ModelGraph,
    targets: Targets | None,
    readers: Sequence[Reader],
    images: Images,
    gone: NDArrayBool,
    resumed: Resumed | None = None,
) -> dict[int, Statistics]:
    """End of each reader -> the moments of what it reads in `graph.model` and of what it should give.

    One pass over the images, from where `resumed` stands up to the last of the readers. Without `targets` the network
    as it is says what is wanted.

    Raises:
        StatisticsError: values that are not finite, with the layer's name.
        GraphError: a network that runs other operators on these images than on its example.
    """
    found = {reader.end: _empty(graph, reader) for reader in readers}
    for reader, x, wanted in rows(graph, targets, readers, images, gone, resumed):
        _add(graph, reader, found[reader.end], x, wanted)
    return found


def rows(
    graph: ModelGraph,
    targets: Targets | None,
    readers: Sequence[Reader],
    images: Images,
    gone: NDArrayBool,
    resumed: Resumed | None = None,
) -> Iterator[tuple[Reader, Tensor, Tensor]]:
    """What `statistics` sums up, batch by batch: a reader, (N, inputs) rows of what it reads, (N, O) of what it should
    give, behind its batch norm.

    Raises:
        GraphError: a network that runs other operators on these images than on its example.
    """
    resumed = resumed or Resumed(graph, images.batches)
    for number, batch in enumerate(images.batches()):
        read = Seen(graph, readers, Places(images, number, batch), outputs=targets is None)
        read.run(resumed, number, batch, over_kept(graph, gone))
        for reader in readers:
            for use in reader.uses:
                if targets is None:
                    wanted = _behind_norm(graph.model, reader, read.outputs[use])
                else:
                    wanted, other = targets.load(number, use)
                    if other is not None:
                        # First the difference: equal shortcuts leave the target as it is, to the bit.
                        wanted = wanted + (other - read.others[use])
                yield reader, read.inputs[use], wanted


class Targets:
    """What the layers of the original network give, and the other operands of their sums: one pass of it.

    Args:
        graph: with the network as it is. What is not known of the original, it says.
        original: the network before earlier steps, if there were any.
    """

    def __init__(
        self, graph: ModelGraph, readers: Sequence[Reader], images: Images, original: Original | None = None
    ) -> None:
        self._kept = Store()
        own: list[_Wanted] = []
        earlier: list[_Wanted] = []
        for reader in readers:
            found = original.counterpart(graph, reader) if original is not None else None
            if found is None:
                own.append((reader, reader, None))
            else:
                earlier.append((reader, *found))
        self._collect(graph, own, images)
        if original is not None:
            self._collect(original.graph, earlier, images)

    def _collect(self, graph: ModelGraph, wanted: Sequence[_Wanted], images: Images) -> None:
        """One pass over the images, for layers of `graph` that stand for others."""
        if not wanted:
            return
        resumed = Resumed(graph, images.batches)
        names = {use: own for reader, there, _ in wanted for use, own in zip(there.uses, reader.uses, strict=True)}
        for number, batch in enumerate(images.batches()):
            places = Places(images, number, batch, names)
            seen = Seen(graph, [there for _, there, _ in wanted], places, inputs=False)
            seen.run(resumed, number, batch, {})
            for _, there, kept in wanted:
                for use in there.uses:
                    outputs, other = _behind_norm(graph.model, there, seen.outputs[use]), seen.others.get(use)
                    if kept is not None:
                        outputs, other = outputs[:, kept], None if other is None else other[:, kept]
                    self._kept.put(f"{number}-{names[use]}", (outputs, other))

    def load(self, batch: int, use: int) -> tuple[Tensor, Tensor | None]:
        """Rows of outputs, behind the batch norm if one follows, and of what is added to them."""
        return self._kept.get(f"{batch}-{use}")


def _behind_norm(model: nn.Module, reader: Reader, rows: Tensor) -> Tensor:
    affine = through_norm(model, reader)
    return rows if affine is None else rows * affine[0].to(rows) + affine[1].to(rows)


def _empty(graph: ModelGraph, reader: Reader) -> Statistics:
    weight = _weight(graph.model, reader)
    outputs = len(weight) // reader.groups
    return [Moments(reader.layer, weight[0].numel(), outputs) for _ in range(reader.groups)]


def _add(graph: ModelGraph, reader: Reader, found: Statistics, x: Tensor, y: Tensor) -> None:
    for group, moments in enumerate(found):
        inputs = x.view(len(x), reader.groups, -1)[:, group]
        wanted = y.view(len(y), reader.groups, -1)[:, group]
        moments.add(inputs, wanted)
        if not has_intercept(graph.model, reader):
            # Mirrored rows have the mean zero, so that the best intercept is none.
            moments.add(-inputs, -wanted)


def has_intercept(model: nn.Module, reader: Reader) -> bool:
    """Whether there is a bias, or a batch norm's mean, that takes up an intercept."""
    return reader.norm is not None or getattr(model.get_submodule(reader.layer), "bias", None) is not None


def _weight(model: nn.Module, reader: Reader) -> Tensor:
    return model.get_parameter(f"{reader.layer}.weight")
