"""A network run once more, with some of its operators looked at or replaced by their number in the trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.choices import Choice, Choices, repeating
from tersenet.graph.dispatch import Dispatch
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.precision import full_float32
from tersenet.graph.trace import SAME, Trace, running, same_operator, tensors_in

Action = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""What is done in place of an operator: it gets the function, its arguments and keyword arguments."""


class _Replay(Dispatch):
    def __init__(self, trace: Trace, actions: dict[int, Action]) -> None:
        super().__init__()
        self._ops = trace.ops
        self._actions = actions
        self.missing = set(actions)
        self._number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SAME:
            return func(*args, **(kwargs or {}))
        number, self._number = self._number, self._number + 1
        action = self._actions.get(number)
        if action is None:
            return func(*args, **(kwargs or {}))
        self.missing.discard(number)
        if not same_operator(self._ops[number].func, func):
            raise GraphError(
                f"the network runs other operators than when it was traced ({func} in place of "
                f"{self._ops[number].func}); a branch in its forward depends on values"
            )
        return action(func, tuple(args), kwargs or {})


def replay(
    model: nn.Module,
    trace: Trace,
    inputs: tuple[Any, ...],
    actions: dict[int, Action],
    choices: Choices | nullcontext[None] | None = None,
) -> Any:
    """The output of `model(*inputs)` with `actions` (operator number -> what to do) in place of some operators.

    Behind the first choice that depends on values, numbers hold only if `choices` are those of the trace.
    """
    mode = _Replay(trace, actions)
    with running(model), full_float32(), choices or nullcontext(), mode:
        output = model(*inputs)
    if mode.missing:
        raise GraphError("the network runs fewer operators than when it was traced; a branch depends on values")
    return output


def over_kept(graph: ModelGraph, gone: NDArrayBool) -> dict[int, Action]:
    """Actions that take means and variances over the kept channels only, as the compact network does.

    Zeroed channels still count in the mean of a layer norm; removed ones don't. With these actions the masked network
    computes what the compact one has to.
    """
    actions: dict[int, Action] = {}
    for statistic in graph.found.statistics:
        removed = torch.from_numpy(gone[graph.units.of[statistic.labels]])
        if bool(removed.any()):
            actions[statistic.op] = _kept_only(graph.trace.ops[statistic.op].name, statistic.axis, ~removed)
    return actions


def _kept_only(name: str, axis: int, kept: Tensor) -> Action:
    # Found here and not in the run, which would take it for a choice of the network.
    places = kept.nonzero().reshape(-1)

    def action(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = places.to(args[0].device)
        some = [args[0].index_select(axis, index), *args[1:]]
        if name == "native_layer_norm":
            some[1] = [len(index)]
            some[2:4] = [None if a is None else a[index] for a in args[2:4]]
        elif name == "native_group_norm":
            some[1:3] = [None if a is None else a[index] for a in args[1:3]]
            some[4] = len(index)
        result = func(*some, **kwargs)
        single = isinstance(result, Tensor)
        # What is run for its memory order: what follows depends on it.
        whole = func(*args, **kwargs)
        pairs = [(result, whole)] if single else zip(result, whole, strict=True)
        results = [_widen(part, full, axis, index) for part, full in pairs]
        return results[0] if single else tuple(results)

    return action


def _widen(part: Any, full: Any, axis: int, index: Tensor) -> Any:
    """Zeros at the removed channels, where the result still has the axis: a mean over it has not."""
    if not isinstance(part, Tensor) or part.shape == full.shape:
        return part
    return torch.zeros_like(full).index_copy_(axis, index, part)


def reference(graph: ModelGraph, gone: NDArrayBool, inputs: tuple[Any, ...]) -> Any:
    """What the compact network has to compute: the masked one, with statistics over kept channels only."""
    return replay(graph.model, graph.trace, inputs, over_kept(graph, gone))


@dataclass(frozen=True)
class Run:
    """What a network gave on `inputs` with `choices`: its outputs, and what it read to choose from, which says more
    than the boxes that were chosen: there may be none."""

    inputs: tuple[Any, ...]
    choices: list[Choice]
    outputs: list[Tensor]
    read: list[Tensor]

    def repeated(self, model: nn.Module) -> Run:
        """What `model` gives on the same inputs with the same choices.

        Raises:
            GraphError: it comes to other choices.
        """
        choices = repeating(tensors_in(self.inputs), self.choices)
        with running(model), full_float32(), choices:
            output = model(*copy.deepcopy(self.inputs))
        return Run(self.inputs, self.choices, tensors_in(output), getattr(choices, "read", []))


def free_run(graph: ModelGraph, gone: NDArrayBool, inputs: tuple[Any, ...]) -> Run | None:
    """What the compact network has to compute where it chooses by itself: other inputs may lead to other operators
    than those of the trace. None if nothing is chosen by values, or if operators behind a choice would have to be
    found by their numbers."""
    start, actions = graph.trace.chosen_from, over_kept(graph, gone)
    if start is None or any(number >= start for number in actions):
        return None
    own = copy.deepcopy(inputs)
    choices = Choices(tensors_in(own))
    output = replay(graph.model, graph.trace, own, actions, choices)
    return Run(inputs, choices.made, tensors_in(output), choices.read)
