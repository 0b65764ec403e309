"""A network, or its graph, put back as it was: so that a change can be tried on it without a copy."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tersenet.graph.lookup import named_modules

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph

_TABLES = frozenset(["_parameters", "_buffers", "_modules"])
# Hooks and the like: torch's own, and many.
_LEFT_ALONE = frozenset(vars(nn.Module())) - _TABLES


def structure_of(model: nn.Module) -> Callable[[], None]:
    """A function that gives every module the class, attributes, tensors and children that it has now, the very same
    objects, and the dicts, lists and sets among them the entries that they have now: some networks keep there what they
    computed in one pass for the next, such as a bias of all heads.

    What is written into tensors in place is not undone.
    """
    saved: list[tuple[Any, Any]] = []
    modules = list(named_modules(model).values())
    classes = list(map(type, modules))
    for module in modules:
        own = module.__dict__
        saved.append((own, own.copy()))
        for name, value in own.items():
            if isinstance(value, (dict, list, set)) and name not in _LEFT_ALONE:
                saved.append((value, value.copy()))  # pyright: ignore

    def restore() -> None:
        for module, cls in zip(modules, classes, strict=True):
            # A ReLU that is left out changes it.
            if type(module) is not cls:
                module.__class__ = cls
        for held, before in saved:
            if held or before:
                _put_back(held, before)

    return restore


def graph_state_of(graph: ModelGraph) -> Callable[[], None]:
    """The same for the network of a graph, and for what the graph knows of it: its record, and what was traced."""
    restore, known = structure_of(graph.model), dict(graph.__dict__)

    def put_back() -> None:
        restore()
        graph.__dict__.clear()
        graph.__dict__.update(known)

    return put_back


def everything_of(graph: ModelGraph) -> Callable[[], None]:
    """The same with the numbers in all parameters and buffers, of which it keeps copies."""
    put_back = graph_state_of(graph)
    values = [(t, t.detach().clone()) for t in [*graph.model.parameters(), *graph.model.buffers()]]

    def undo() -> None:
        put_back()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)

    return undo


def _put_back(held: Any, before: Any) -> None:
    """Give a dict, list or set its entries back, in place, since others may hold it too."""
    if isinstance(held, dict):
        if len(held) == len(before) and all(map(is_, held, before)) and all(map(is_, held.values(), before.values())):  # pyright: ignore
            return
        for key in [key for key in held if key not in before]:  # pyright: ignore
            del held[key]
        held.update(before)
        if list(held) != list(before):  # pyright: ignore[reportUnknownArgumentType]
            held.clear()
            held.update(before)
    elif isinstance(held, list):
        held[:] = before
    elif held != before:
        held.intersection_update(before)
        held.update(before)
