"""A network run from the middle: what is alive at one operator is kept for every batch, what comes before is skipped.

Layers are solved in the order in which they run, and nothing before the one at hand changes any more. So all layers
together cost about as many operators as a few passes, instead of a pass up to each of them.

The network's own code runs every time; only its operators are left out. Those that don't depend on the images, such as
what is computed of parameters, still run. That a resumed run gives the same bits is checked on two images at every
place before anything is kept there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tersenet.calibration.store import Store
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import Action, replay
from tersenet.graph.trace import Op, Ref, refs_in, tensors_in

Batch = tuple[Any, ...]
Shapes = dict[int, list[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]]
Alive = dict[int, Tensor]


class Reached(Exception):
    """What follows is not needed."""


class Resumed:
    """The network of `graph` on `batches` from the operator `at` on, which goes forward by `advance`.

    `batches` gives the same ones every time, and copies of them: a network may write into what it is given.
    """

    def __init__(self, graph: ModelGraph, batches: Callable[[], Iterable[Batch]]) -> None:
        self.graph, self.batches, self.at = graph, batches, 0
        self._kept = Store()
        self._shapes: dict[tuple[tuple[int, ...], ...], Shapes] = {}
        self._possible = graph.trace.chosen_from is None

    def run(self, number: int, batch: Batch, actions: Mapping[int, Action]) -> Any:
        """The output on batch `number`, with `actions` in place of operators; those that were skipped have none."""
        skipped: dict[int, Action] = {}
        if self.at:
            skipped = self._skipping(self.at, batch, self._kept.get(str(number)))
        return replay(self.graph.model, self.graph.trace, batch, {**actions, **skipped})

    def advance(self, to: int, actions: Mapping[int, Action]) -> None:
        """Keep what is alive before operator `to`. Nothing before it may change any more.

        `actions` are what is done in place of operators; where a resumed run would differ, all stays as it was.
        """
        if not self._possible or to <= self.at:
            return
        cuts = self.graph.trace.cuts
        if to not in cuts:
            first = next(iter(self.batches()))
            cuts[to] = self._same(to, tuple(x[:2].clone() for x in first), actions)
        if not cuts[to]:
            self._possible = False
            return
        for number, batch in enumerate(self.batches()):
            self._kept.put(str(number), self._alive(number, batch, to, actions))
        self.at = to

    def _same(self, to: int, batch: Batch, actions: Mapping[int, Action]) -> bool:
        """Whether the output is the same to the bit, with the run cut in two at `to`."""

        def outputs(actions: Mapping[int, Action]) -> list[Tensor]:
            # Of a copy: a network may write into what it is given.
            return tensors_in(replay(self.graph.model, self.graph.trace, copy.deepcopy(batch), dict(actions)))

        whole = outputs(actions)
        alive = _Watch(self, copy.deepcopy(batch), to, {}).alive(dict(actions))
        parts = outputs({**actions, **self._skipping(to, batch, alive)})
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(whole, parts, strict=True))

    def _alive(self, number: int, batch: Batch, to: int, actions: Mapping[int, Action]) -> Alive:
        kept: Alive = self._kept.get(str(number)) if self.at else {}
        skipped = self._skipping(self.at, batch, kept) if self.at else {}
        return _Watch(self, batch, to, kept).alive({**actions, **skipped})

    def living(self, at: int) -> set[int]:
        """The slots that depend on the images, are made before an operator and read from it on."""
        return {slot for slot, (made, read) in self._lives.items() if made < at <= read}

    @cached_property
    def _lives(self) -> dict[int, tuple[int, int]]:
        """Slot that depends on the images -> the operators that make it and that read it last.

        Views are made anew of what they show, which lives as long as they do.
        """
        made: dict[int, int] = {}
        read = {ref.slot: len(self.graph.trace.ops) for ref in refs_in(self.graph.trace.outputs)}
        for op in reversed(self.graph.trace.ops):
            results, last = [ref.slot for ref in refs_in(op.result)], op.number
            if op.func.is_view:
                last = max([last, *(read.get(slot, 0) for slot in results)])
            else:
                made |= dict.fromkeys(results, op.number)
            for ref in refs_in([op.args, op.kwargs]):
                read[ref.slot] = max(read.get(ref.slot, 0), last)
        return {slot: (made[slot], read[slot]) for slot in made.keys() & read.keys() & self.dependent}

    @cached_property
    def dependent(self) -> set[int]:
        """The slots that depend on the network's inputs. What is written into makes the tensor that it is a part of
        depend on it too."""
        found, before = set(self.graph.trace.inputs), -1
        while len(found) > before:
            before = len(found)
            for op in self.graph.trace.ops:
                used = {ref.slot for ref in refs_in([op.args, op.kwargs])}
                if used & found:
                    found |= {ref.slot for ref in refs_in(op.result)}
                    if op.func._schema.is_mutable:
                        found |= used & self._based(op)
        return found

    def _based(self, op: Op) -> set[int]:
        """What a writing operator writes into, and the tensors that this is a view of."""
        slots = {ref.slot for ref in refs_in([op.args[0]])} if op.args else set[int]()
        for earlier in reversed(self.graph.trace.ops[: op.number]):
            if earlier.func.is_view and slots & {ref.slot for ref in refs_in(earlier.result)}:
                slots |= {ref.slot for ref in refs_in([earlier.args[0]])}
        return slots

    def shapes_of(self, batch: Batch) -> Shapes:
        """Operator -> what its results look like on such a batch; known after the first run."""
        return self._shapes.setdefault(tuple(tuple(x.shape) for x in tensors_in(batch)), {})

    def _skipping(self, to: int, batch: Batch, alive: Alive) -> dict[int, Action]:
        """Actions that give what is kept, and of everything else only the shape."""
        shapes = self.shapes_of(batch)
        actions: dict[int, Action] = {}
        for op in self.graph.trace.ops[:to]:
            made = [ref.slot for ref in refs_in(op.result)]
            if op.func.is_view or not self.dependent.intersection(made):
                continue
            known = [alive.get(slot) for slot in made]
            actions[op.number] = _given(op, known, shapes.get(op.number))
        return actions


class _Watch:
    """One run up to an operator that holds on to what is alive there."""

    def __init__(self, resumed: Resumed, batch: Batch, to: int, kept: Alive) -> None:
        self.resumed, self.batch, self.to = resumed, batch, to
        self.found = dict(kept)
        self.shapes = resumed.shapes_of(batch)

    def alive(self, actions: dict[int, Action]) -> Alive:
        graph = self.resumed.graph
        living = self.resumed.living(self.to)
        watching = {op.number: self._look(op, living, actions.get(op.number)) for op in graph.trace.ops[: self.to]}
        with suppress(Reached):
            replay(graph.model, graph.trace, self.batch, {**actions, **watching, self.to: _stop})
        return {slot: tensor for slot, tensor in self.found.items() if slot in living}

    def _look(self, op: Op, living: set[int], action: Action | None) -> Action:
        slots = [ref.slot for ref in refs_in(op.result)]

        def look(func: Any, args: Batch, kwargs: dict[str, Any]) -> Any:
            result = func(*args, **kwargs) if action is None else action(func, args, kwargs)
            tensors = tensors_in(result)
            if op.number not in self.shapes:
                self.shapes[op.number] = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
            self.found |= {s: x for s, x in zip(slots, tensors, strict=True) if s in living}
            return result

        return look


def _given(op: Op, known: list[Tensor | None], shapes: Any) -> Action:
    def give(func: Any, args: Batch, kwargs: dict[str, Any]) -> Any:
        if op.args and op.result == op.args[0]:
            return args[0]  # it wrote into it
        if shapes is None:
            return func(*args, **kwargs)
        results = [
            x if x is not None else torch.empty_strided(size, stride, dtype=dtype, device=device)
            for x, (size, stride, dtype, device) in zip(known, shapes, strict=True)
        ]
        return results[0] if isinstance(op.result, Ref) else type_of(func)(results)

    return give


def type_of(func: Any) -> Any:
    """Several results come as a tuple, an operator's list of tensors as a list."""
    return list if len(func._schema.returns) == 1 else tuple


def _stop(func: Any, args: Batch, kwargs: dict[str, Any]) -> Any:
    raise Reached
