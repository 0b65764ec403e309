"""The network is run without some of its channels, to find the sizes that its code keeps in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tersenet.graph import lookup
from tersenet.graph.compare import first_difference
from tersenet.graph.edits import Keep, Resize
from tersenet.graph.labels import Labelling
from tersenet.graph.mend import Fixed, Mend, Sizes, alike, options
from tersenet.graph.shrink import cuts
from tersenet.graph.trace import Trace
from tersenet.graph.undo import structure_of
from tersenet.graph.units import Units, build_units

MAX_TRIALS = 40


def find_fixed(model: nn.Module, example: tuple[Any, ...], trace: Trace, found: Labelling) -> Fixed:
    """Attributes that have to shrink with the channels, and operators whose channels have to stay.

    Args: found: the labels with coupled residual trunks; sizes that are numbers are the same in every residual mode.
        What has to stay is frozen in it.
    """
    fixed = Fixed()
    smaller = _Smaller(model, example, trace)
    tried: dict[int, int] = {}
    stuck: Counter[int] = Counter()
    pending: dict[int, list[Mend]] = {}
    for _ in range(MAX_TRIALS):
        units = fixed.units = build_units(found)
        gone = _some(units)
        if not gone.any():
            return fixed
        sizes = Sizes(trace, found, gone[units.of])
        problem = smaller.first_difference(cuts(model, trace, found, units, fixed.mends, gone), sizes)
        if problem is None:
            return fixed
        number, why = problem
        op = trace.ops[number]
        # A size that is wrong before the dispatcher sees it belongs to the next operator.
        ways = options(model, trace, sizes, op) or [
            way for after in trace.ops[number + 1 : number + 3] for way in options(model, trace, sizes, after)
        ]
        for mend in pending.get(number, []):
            fixed.mends.remove(mend)
        pending[number] = []
        tries = tried[number] = tried.get(number, -1) + 1
        if tries < len(ways):
            pending[number] = [m for m in alike(trace, model, ways[tries], sizes) if m not in fixed.mends]
            fixed.mends += pending[number]
            continue
        _stick(fixed, found, trace, number, why, stuck[number])
        stuck[number] += 1
    fixed.units = None
    # What is left after so many lines would take too long: everything stays.
    for op in trace.ops:
        fixed.stuck[op.number] = f"sizes in its code could not be found out in {MAX_TRIALS} trials"
        found.freeze_around(op, fixed.stuck[op.number])
    return fixed


def _stick(fixed: Fixed, found: Labelling, trace: Trace, number: int, why: str, before: int) -> None:
    """The channels at an operator, and at the same line in other modules, have to stay. `before`: how often that was
    said already, and was not enough."""
    first = trace.ops[number]
    place = str(first.place)
    modules: set[str] = set()
    for op in trace.ops:
        same = (op.place.file, op.place.line, op.func) == (first.place.file, first.place.line, first.func)
        if op.number == number or (same and place):
            if op.number in fixed.stuck:
                modules.add(op.place.module)
            reason = f"numbers of channels are fixed in forward at {place or op.name} (aten.{op.name}: {why})"
            fixed.stuck[op.number] = reason
            found.freeze_around(op, reason)
    # The number comes from another tensor of the same module; or else from anywhere.
    for op in trace.ops if modules else []:
        if before > 1 or op.place.module in modules or any(op.place.module.startswith(f"{m}.") for m in modules):
            fixed.stuck.setdefault(op.number, fixed.stuck[number])
            found.freeze_around(op, fixed.stuck[number])


def _some(units: Units) -> Any:
    """A share of the units of every group that is free, another one in each: equal ones hide what depends on what."""
    gone = np.zeros(int(units.of.max()) + 1, dtype=bool)
    for number, group in enumerate(units.groups):
        share = 0.2 + 0.25 * ((number * 0.618) % 1)
        if group.frozen is None and group.size > 1:
            gone[group.units[-max(1, int(group.size * share)) :]] = True
    return gone


class _Smaller:
    """The network itself without some channels, for one pass; then it is as it was before.

    Without values (on `meta`) as far as that shows the same operators, which takes neither time nor memory.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...], trace: Trace) -> None:
        self.model = model
        self.example = example
        self.trace = trace
        # Another device has other fused operators, and nothing to choose by.
        self.without_values = not trace.choices and not any("attention" in op.name for op in trace.ops)

    def first_difference(self, edits: Sequence[Keep | Resize], sizes: Sizes) -> tuple[int, str] | None:
        found = self._run(edits, sizes, meta=True) if self.without_values else None
        if found is None and self.without_values:
            return None
        found = self._run(edits, sizes, meta=False)
        # What runs only with values will not run without them later.
        self.without_values &= found is not None
        return found

    def _run(self, edits: Sequence[Keep | Resize], sizes: Sizes, meta: bool) -> tuple[int, str] | None:
        restore = structure_of(self.model)
        try:
            if meta:
                _drop_values(self.model)
            for edit in edits:
                edit.replay(self.model)
            example = tree_map_only(Tensor, lambda x: x.to("meta"), self.example) if meta else self.example
            return first_difference(self.model, example, self.trace, sizes)
        finally:
            restore()


def _drop_values(model: nn.Module) -> None:
    known: dict[int, Tensor] = {}
    for module in lookup.named_modules(model).values():
        for table in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = known.setdefault(id(tensor), _without_values(tensor))  # pyright: ignore


def _without_values(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
