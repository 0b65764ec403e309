"""Sizes that a network's code keeps in numbers: found by running a smaller copy, mended where they are attributes.

Most code takes sizes from tensors, and needs nothing. Where a module keeps them (`split(self.width)`,
`reshape(B, N, self.num_heads, -1)`), the attribute has to shrink with the channels. Where they are written into forward
(`view(-1, 2048)`), the channels stay, and the reason names the line.

A copy with a third of all channels missing is run (`trial`), and every operator's shapes are compared with what the
labels say (`compare`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersenet.graph import lookup
from tersenet.graph.edits import is_size
from tersenet.graph.labels import Labelling, NDArrayBool, varying
from tersenet.graph.statements import attributes_at
from tersenet.graph.trace import Op, Trace
from tersenet.graph.units import Units


@dataclass(frozen=True)
class Literal:
    """A number among an operator's arguments: `argument` and, in a list, `index`."""

    op: int
    argument: int
    index: int | None
    old: int


@dataclass(frozen=True)
class Mend:
    """`module.attribute` (or its entry `index`) has to be `ratio` times what `literal` has to be."""

    module: str
    attribute: str
    index: int | None
    literal: Literal
    ratio: Fraction


@dataclass
class Fixed:
    """What the trial found: attributes that shrink, and operators whose channels have to stay (number -> reason).

    `units` are those of the labels that the trial ended with.
    """

    mends: list[Mend] = field(default_factory=list[Mend])
    stuck: dict[int, str] = field(default_factory=dict[int, str])
    units: Units | None = None


class Sizes:
    """What sizes have to be when some units are gone."""

    def __init__(self, trace: Trace, found: Labelling, removed: NDArrayBool) -> None:
        """Args: removed: per label, whether it is gone."""
        self.trace = trace
        self.found = found
        self.removed = removed
        self._counted: dict[tuple[Any, ...], int] = {}

    def shape(self, held: list[Tensor]) -> tuple[int, ...]:
        shape = [*held[0].shape]
        for labels in held:
            for axis in varying(labels):
                # Most operators hand on the labels that they get.
                key = labels.data_ptr(), labels.shape, labels.stride(), axis
                if key not in self._counted:
                    self._counted[key] = self.count(labels, axis, labels.shape[axis])
                shape[axis] = min(shape[axis], self._counted[key])
        return tuple(shape)

    def count(self, labels: Tensor, axis: int, stop: int) -> int:
        """How many of the first `stop` places along `axis` are left."""
        axes = varying(labels)
        if axis not in axes:
            return stop
        part = labels
        for other in range(labels.dim()):
            if other not in axes:
                part = part.narrow(other, 0, 1)
        gone = self.removed[part.numpy()]
        left = ~np.all(gone, axis=tuple(a for a in range(labels.dim()) if a != axis), keepdims=True).reshape(-1)
        return int(left[:stop].sum())

    def expected(self, op: int) -> list[tuple[int, ...] | None]:
        """The shapes of an operator's results, None where it makes no channels. A size of -1 may be any: what has no
        channels is widened to those of another tensor, and the operator that reads both will tell."""
        shapes = [self.shape(held) if held else None for held in self.found.results.get(op, [])]
        if self.trace.ops[op].name == "expand" and shapes and shapes[0] is not None:
            narrow = self.trace.slots[self.trace.ops[op].args[0].slot].shape
            narrow = (1,) * (len(shapes[0]) - len(narrow)) + narrow
            shapes[0] = tuple(-1 if a == 1 < b else b for a, b in zip(narrow, shapes[0], strict=True))
        return shapes

    def literals(self, op: Op) -> Iterator[tuple[Literal, int]]:
        """The numbers in `op` that belong to channels, with what they have to become."""
        source = self.found.sources.get(op.number)
        shapes = self.expected(op.number)
        if not shapes or shapes[0] is None:
            return
        rank = len(shapes[0])
        if op.name in ("view", "_unsafe_view", "reshape", "expand"):
            # A size that follows from the others is -1 or computed; one that does not change needs no attribute.
            for index, old in enumerate(op.args[1]):
                new = shapes[0][index + rank - len(op.args[1])]
                yield Literal(op.number, 1, index, old), new if new >= 0 else old
        elif op.name == "split":
            yield Literal(op.number, 1, None, op.args[1]), shapes[0][_dim(op, 2) % rank]
        elif op.name == "split_with_sizes":
            for index, old in enumerate(op.args[1]):
                size = shapes[index]
                if size is not None:
                    yield Literal(op.number, 1, index, old), size[_dim(op, 2) % rank]
        elif op.name == "slice" and source is not None:
            for place in (2, 3):
                if len(op.args) > place and isinstance(op.args[place], int) and 0 < op.args[place] <= 1 << 40:
                    axis, old = _dim(op, 1) % rank, op.args[place]
                    if old < source.shape[axis]:
                        yield Literal(op.number, place, None, old), self.count(source, axis, old)
        elif op.name == "narrow" and source is not None:
            axis, start, length = _dim(op, 1) % rank, op.args[2], op.args[3]
            begin = self.count(source, axis, start)
            yield Literal(op.number, 2, None, start), begin
            yield Literal(op.number, 3, None, length), self.count(source, axis, start + length) - begin
        elif op.name == "convolution" and op.args[8] > 1 and source is not None and op.args[8] == source.shape[1]:
            yield Literal(op.number, 8, None, op.args[8]), self.count(source, 1, source.shape[1])


def _dim(op: Op, place: int) -> int:
    return op.args[place] if len(op.args) > place else op.kwargs.get("dim", 0)


def options(model: nn.Module, trace: Trace, sizes: Sizes, op: Op) -> list[list[Mend]]:
    """Ways to set attributes so that `op` gets the numbers that it has to get."""
    changed = [(lit, new) for lit, new in sizes.literals(op) if lit.old != new]
    module = lookup.named_modules(model).get(op.place.module)
    if not changed or module is None:
        return []
    names = attributes_at(op.place)
    choices: list[list[Mend]] = []
    for literal, _ in changed:
        found = list(_candidates(op.place.module, module, names, literal, listed=True))
        found += [m for m in _candidates(op.place.module, module, names, literal, listed=False) if m not in found]
        # A number that Python computes from a tensor's shape needs no attribute.
        choices.append([*found[:4]])
    filled = [c for c in choices if c]
    if not filled:
        return []
    ways = [_once(way) for way in itertools.islice(itertools.product(*filled), 24)]
    return [way for way in ways if way]


def _once(way: tuple[Mend, ...]) -> list[Mend]:
    """Every attribute once; nothing if two numbers want different things of one."""
    found: dict[tuple[str, str, int | None], Mend] = {}
    for mend in way:
        known = found.setdefault((mend.module, mend.attribute, mend.index), mend)
        if (known.ratio, known.literal.old) != (mend.ratio, mend.literal.old):
            return []
    return list(found.values())


def _candidates(path: str, module: nn.Module, names: list[str], literal: Literal, listed: bool) -> Iterator[Mend]:
    holders = vars(module)
    for name in names if listed else holders:
        value = holders.get(name)
        if isinstance(value, bool) or not is_size(name):
            continue
        if isinstance(value, int) and value > 0 and literal.old > 0:
            ratio = Fraction(value, literal.old)
            if ratio == 1 or (listed and 1 in (ratio.numerator, ratio.denominator)):
                yield Mend(path, name, None, literal, ratio)
        elif isinstance(value, (list, tuple)) and literal.index is not None and literal.index < len(value):
            if value[literal.index] == literal.old and all(isinstance(v, int) for v in value):
                yield Mend(path, name, literal.index, literal, Fraction(1))
        elif isinstance(value, (list, tuple)) and literal.old in value and all(isinstance(v, int) for v in value):
            yield Mend(path, name, list(value).index(literal.old), literal, Fraction(1))


def alike(trace: Trace, model: nn.Module, way: list[Mend], sizes: Sizes) -> list[Mend]:
    """The same change at the same line in every other module of that class."""
    modules = lookup.named_modules(model)
    first = trace.ops[way[0].literal.op]
    made = list(way)
    for op in trace.ops:
        if op.number == first.number or (op.place.file, op.place.line, op.func) != (
            first.place.file,
            first.place.line,
            first.func,
        ):
            continue
        known = {(lit.argument, lit.index): lit for lit, _ in sizes.literals(op)}
        module = modules.get(op.place.module)
        for mend in way:
            literal = known.get((mend.literal.argument, mend.literal.index))
            if literal is None or module is None or op.place.module == mend.module:
                continue
            value = vars(module).get(mend.attribute)
            entry = value[mend.index] if mend.index is not None and isinstance(value, (list, tuple)) else value
            if isinstance(entry, int) and entry == literal.old * mend.ratio:
                made.append(Mend(op.place.module, mend.attribute, mend.index, literal, mend.ratio))
    return made


def values(mends: list[Mend], model: nn.Module, trace: Trace, sizes: Sizes) -> dict[tuple[str, str], Any]:
    """(module, attribute) -> what it has to be."""
    found: dict[tuple[str, str], Any] = {}
    modules = lookup.named_modules(model)
    for mend in mends:
        new = dict(sizes.literals(trace.ops[mend.literal.op])).get(mend.literal)
        if new is None:
            continue
        value: int = int(new * mend.ratio)
        key = mend.module, mend.attribute
        if mend.index is None:
            found[key] = value
        else:
            entries = list(found.get(key, vars(modules[mend.module])[mend.attribute]))
            entries[mend.index] = value
            found[key] = tuple(entries)
    return found
