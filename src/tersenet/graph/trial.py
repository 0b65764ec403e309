"""A smaller copy of the network is run, to find the sizes that its code keeps in numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import nn

from tersenet.graph.labels import Labeller, Labelling
from tersenet.graph.mend import Fixed, Mend, Sizes, alike, first_difference, options
from tersenet.graph.shrink import cuts
from tersenet.graph.trace import Trace
from tersenet.graph.units import Units, build_units

MAX_TRIALS = 40


def find_fixed(model: nn.Module, example: tuple[Any, ...], trace: Trace) -> Fixed:
    """Attributes that have to shrink with the channels, and operators whose channels have to stay.

    Found with the residual trunks coupled; sizes that are numbers are the same numbers in every residual mode.
    """
    fixed = Fixed()
    found = Labeller(model, trace, "coupled").run()
    tried: dict[int, int] = {}
    pending: dict[int, list[Mend]] = {}
    for _ in range(MAX_TRIALS):
        units = build_units(found)
        gone = _some(units)
        if not gone.any():
            return fixed
        sizes = Sizes(trace, found, gone[units.of])
        problem = first_difference(_smaller(model, trace, found, units, fixed.mends, gone), example, trace, sizes)
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
        _stick(fixed, found, trace, number, why)
    # What is left after so many lines would take too long: everything stays.
    for op in trace.ops:
        fixed.stuck[op.number] = f"sizes in its code could not be found out in {MAX_TRIALS} trials"
    return fixed


def _stick(fixed: Fixed, found: Labelling, trace: Trace, number: int, why: str) -> None:
    """The channels at an operator, and at the same line in other modules, have to stay."""
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
    # Not enough: the number comes from another tensor of the same module.
    for op in trace.ops if modules else []:
        if op.place.module in modules or any(op.place.module.startswith(f"{m}.") for m in modules):
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


def _smaller(model: nn.Module, trace: Trace, found: Labelling, units: Units, mends: list[Mend], gone: Any) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    smaller = copy.deepcopy(model, memo)
    for edit in cuts(model, trace, found, units, mends, gone):
        edit.replay(smaller)
    return smaller
