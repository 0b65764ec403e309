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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.calibration.original import Original
from tersenet.calibration.readers import Reader, through_norm
from tersenet.calibration.resume import Reached, Resumed
from tersenet.calibration.store import Store
from tersenet.data.bundle import Loader, first_tensor
from tersenet.errors import TersenetError
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import Action, over_kept
from tersenet.ops.gram import Moments
from tersenet.ops.rows import conv_rows, draw_positions, output_rows
from tersenet.train.batch import move

_Wanted = tuple[Reader, Reader, Tensor | None]
"""A layer, the one that says what it should give (the layer itself, or one of another network), and which outputs."""
_OTHERS = 128  # images kept for measuring

Statistics = list[Moments]
"""One for each group of a convolution, of all its outputs."""


@dataclass
class Images:
    """The first `images` training images of epoch 0 and `positions` of each layer's outputs for each of them.

    Both follow from `seed` and are the same in every pass. They are loaded once.
    """

    loader: Loader
    images: int
    positions: int
    seed: int
    device: torch.device
    _loaded: Store | None = field(default=None, init=False, repr=False)
    _count: int = field(default=0, init=False)
    _others: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]], init=False, repr=False)

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """Inputs of the network, at most `images` of them.

        Raises:
            TersenetError: batches of named inputs.
        """
        loaded = self._load()
        for number in range(self._count):
            yield tuple(move(loaded.get(str(number)), self.device))

    def others(self, count: int) -> list[tuple[Any, ...]]:
        """At most `count` (128) training images that are not among `batches`; of those where there are no more."""
        self._load()
        return list(_first(self._others or self.batches(), count))

    def seen(self) -> int:
        """How many there are."""
        return min(self.images, self.loader.n)

    def _load(self) -> Store:
        if self._loaded is not None:
            return self._loaded
        loaded = Store()
        count, left, others = 0, self.images, list[tuple[Any, ...]]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for inputs, _ in self.loader.batches(0):
                if isinstance(inputs, dict):
                    raise TersenetError("calibration takes batches of one tensor or of several in order, not a dict")
                several = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
                if left > 0:
                    # Copies: a slice would be kept with all that it is a part of.
                    loaded.put(str(count), tuple(x[:left].clone() for x in several))
                    count += 1
                if len(first_tensor(several)) > left:
                    others.append(tuple(move([x[max(left, 0) : left + _OTHERS] for x in several], self.device)))
                left -= len(first_tensor(several))
                if left <= -_OTHERS:
                    break
        self._loaded, self._count, self._others = loaded, count, others
        return loaded


def _first(batches: Iterable[tuple[Any, ...]], count: int) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        yield tuple(x[:count] for x in batch)
        count -= len(first_tensor(batch))
        if count <= 0:
            return


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
        read = _Seen(graph, readers, _Places(images, number, batch), outputs=targets is None)
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
            places = _Places(images, number, batch, names)
            seen = _Seen(graph, [there for _, there, _ in wanted], places, inputs=False)
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


class _Places:
    """Positions for each use of a layer, drawn when they are first asked for: the same for both networks."""

    def __init__(
        self, images: Images, number: int, batch: tuple[Any, ...], names: Mapping[int, int] | None = None
    ) -> None:
        """`names`: use -> the use of the other network whose positions these are."""
        self.images, self.batch, self.count = images, number, len(first_tensor(batch))
        self._names = names or {}
        self._drawn: dict[int, Tensor] = {}

    def of(self, use: int, count: int, places: int, per_image: int) -> Tensor:
        use = self._names.get(use, use)
        if use not in self._drawn:
            seed = hash((self.images.seed, self.batch, use)) % (1 << 62)
            self._drawn[use] = draw_positions(count, places, per_image, torch.Generator().manual_seed(seed))
        return self._drawn[use]


class _Seen:
    """Rows of inputs, outputs and other operands of sums, by the use that they belong to."""

    def __init__(
        self,
        graph: ModelGraph,
        readers: Sequence[Reader],
        places: _Places,
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self.graph, self.places = graph, places
        self.keeps_outputs, self.keeps_inputs = outputs, inputs
        self.last = max(reader.last for reader in readers)
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.others: dict[int, Tensor] = {}
        self.actions: dict[int, Action] = {}
        for reader in readers:
            for use in reader.uses:
                self.actions[use] = self._layer(reader, use)
            if reader.sum is not None:
                self.actions[reader.sum[0]] = self._sum(reader, self.actions.get(reader.sum[0]))

    def run(self, resumed: Resumed, number: int, batch: tuple[Any, ...], others: Mapping[int, Action]) -> None:
        """As far as it has to; `others` are what else is done in place of operators."""
        before = self.actions[self.last]

        def stop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before(func, args, kwargs)
            raise Reached

        with suppress(Reached):
            resumed.run(number, batch, {**others, **self.actions, self.last: stop})

    def _layer(self, reader: Reader, use: int) -> Action:
        argument = self.graph.ends[reader.end].reads_argument
        # A linear layer adds its bias behind the product where it reads a view: it belongs to what is wanted.
        apart = getattr(self.graph.model.get_submodule(reader.layer), "bias", None)
        apart = apart if self.graph.trace.ops[use].name == "mm" else None

        def look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # The last layer's result is not used where the outputs are known: its shape will do.
            idle = use == self.last and not self.keeps_outputs
            result: Tensor = _on_meta(func, args, kwargs) if idle else func(*args, **kwargs)
            x: Tensor = args[argument].detach()
            if result.dim() == 2:
                most = self.places.images.positions * self.places.count
                rows = self.places.of(use, 1, len(x), most)[0].to(x.device)
                x = x[rows]
                if self.keeps_outputs:
                    y = result.detach()[rows]
                    self.outputs[use] = y if apart is None else y + apart.detach()
            else:
                at = self.places.of(use, len(x), prod(result.shape[2:]), self.places.images.positions)
                if self.keeps_outputs:
                    self.outputs[use] = output_rows(result.detach().flatten(2)[:, :, None], at)
                if self.keeps_inputs:
                    x = _conv_inputs(x, args, at)
            if self.keeps_inputs:
                self.inputs[use] = x
            return result

        return look

    def _sum(self, reader: Reader, inner: Action | None) -> Action:
        assert reader.sum is not None
        place, use = reader.sum[1], reader.uses[0]

        def look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            other = args[place].detach().flatten(2)[:, :, None]
            self.others[use] = output_rows(other, self.places.of(use, 0, 0, 0))
            return func(*args, **kwargs) if inner is None else inner(func, args, kwargs)

        return look


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)


def _conv_inputs(x: Tensor, args: tuple[Any, ...], at: Tensor) -> Tensor:
    """Rows of what a convolution's operator reads; of a 1d one, as of an image that is one value high."""
    kernel = tuple(args[1].shape[2:])
    flat = len(kernel) == 1
    if flat:
        x = x[:, :, None]

    def pair(index: int, missing: int) -> tuple[int, int]:
        values = tuple(args[index])
        return (missing, values[0]) if flat else (values[0], values[-1])

    size = (1, kernel[0]) if flat else (kernel[0], kernel[1])
    return conv_rows(x, size, at, stride=pair(3, 1), padding=pair(4, 0), dilation=pair(5, 1))
