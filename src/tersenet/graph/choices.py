"""What a network chooses by the values of its tensors: which boxes are kept, which places are not zero, which branch.

How many tensors there are behind a choice, and of which shapes, depends on the input. A network that runs with the
choices of another run does the same operators as that run, on its own values. That is how a smaller copy, and the
network on another input, can be compared with the trace from the first operator to the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

from tersenet.errors import GraphError
from tersenet.graph.dispatch import Dispatch

CHOOSING = frozenset(
    "nonzero _local_scalar_dense equal is_nonzero nms _unique2 unique_dim unique_consecutive unique_dim_consecutive "
    "topk multinomial".split()
)
"""Operators whose result, or its size, stands for a choice. A sort of one row, and a mask as index, make one too."""
_MOST_BOXES = 16
_INDEXING = frozenset("index index_put".split())
_MASKED = _INDEXING | {"masked_select"}


@dataclass(frozen=True)
class Choice:
    """One choice: an operator and its result; of `topk` the indices, and where a mask is an index, the indices.

    `by_values`: of the network's input. Others are made of constants and sizes, and are made anew in every run.
    """

    func: Any
    by_values: bool
    made: Any


class Choices(Dispatch):
    """Inside, choices by values are noted in `made`, or made as `known` says.

    Their operators still run where modes outside of this one count operators: enter this one first.

    `read` are the floating tensors that were chosen from, without what is not finite.

    Args:
        inputs: the network's input tensors.
        known: the choices of another run.
        never_nothing: where nothing would be chosen, choose the first: a trace should see what follows.
    """

    def __init__(self, inputs: list[Tensor], known: list[Choice] | None = None, never_nothing: bool = False) -> None:
        super().__init__()
        self.made: list[Choice] = []
        self.read: list[Tensor] = []
        self.filled = False
        self._known = None if known is None else iter(known)
        self._never_nothing = never_nothing
        # Storages, since a view and its base hold the same values. A weak reference keeps a storage's number taken.
        self._depending: dict[int, StorageWeakRef] = {}
        self._mark(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chooses = is_choice(func, args)
        if self._known is not None:
            return self._follow(func, args, kwargs) if chooses else func(*args, **kwargs)
        depends = self._depends([args, kwargs])
        if not chooses:
            result = func(*args, **kwargs)
        else:
            made = _made(func, args, kwargs)
            if depends and self._never_nothing:
                made, filled = _never_nothing(made, args)
                self.filled |= filled
            self.made.append(Choice(func, depends, made))
            result = self._chosen(self.made[-1], args, kwargs)
        if depends:
            self._mark(_tensors(result))
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        choice = next(self._known, None) if self._known is not None else None
        if choice is None or choice.func is not func:
            raise GraphError(f"the network makes other choices than before ({func}); a branch depends on values")
        return self._chosen(choice, args, kwargs)

    def _chosen(self, choice: Choice, args: Any, kwargs: Any) -> Any:
        if not choice.by_values:
            return choice.func(*args, **kwargs)
        if _name(choice.func) not in _MASKED:
            # What must not be chosen is often set to minus infinity.
            self.read += [t.detach().nan_to_num(0, 0, 0) for t in _tensors(args) if t.is_floating_point()]
        return _result(choice.func, args, kwargs, choice.made)

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if _has_storage(tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self._depending.setdefault(reference.cdata, reference)

    def _depends(self, args: Any) -> bool:
        return any(
            not _has_storage(tensor) or StorageWeakRef(tensor.untyped_storage()).cdata in self._depending
            for tensor in _tensors(args)
        )


def _has_storage(tensor: Tensor) -> bool:
    """A sparse tensor has none; what is made of it may depend on anything."""
    return tensor.layout is torch.strided


def repeating(inputs: list[Tensor], known: list[Choice]) -> Choices | nullcontext[None]:
    """The context in which a network makes the choices of another run; it costs nothing where there are none."""
    return Choices(inputs, known) if known else nullcontext()


def is_choice(func: Any, args: Any) -> bool:
    """Whether the result of an operator of the dispatcher, or its size, depends on values in a way that counts."""
    name = _name(func)
    if name == "sort":
        return args[0].dim() == 1  # of several rows, each may be a channel's
    if name == "masked_select":
        return True
    return name in CHOOSING or (name in _INDEXING and any(_is_mask(index) for index in args[1]))


@lru_cache(maxsize=4096)
def _name(func: Any) -> str:
    return func._schema.name.rsplit("::", 1)[-1].removesuffix("_")


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 0


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """What is chosen here: the result, the indices of a sorting, or the places of every mask."""
    name = _name(func)
    if name in _INDEXING:
        return [index.nonzero() if _is_mask(index) else None for index in args[1]]
    if name == "masked_select":
        return [torch.broadcast_tensors(*args)[1].nonzero()]
    result = func(*args, **kwargs)
    if name == "nms":
        # The best ones. A head that runs once for every box would make up nearly all of a detector's time.
        return result[:_MOST_BOXES]
    return result[1] if name in ("topk", "sort") else result


def _never_nothing(made: Any, args: Any) -> tuple[Any, bool]:
    """The same choice, but of the first place where it was of none; and whether that was so."""
    parts = made if isinstance(made, list) else [made]
    empty = [isinstance(p, Tensor) and p.dim() == 2 and len(p) == 0 and p.shape[1] > 0 for p in parts]
    if not any(empty) or any(0 in tensor.shape for tensor in _tensors(args)):
        return made, False
    filled = [p.new_zeros(1, p.shape[1]) if e else p for p, e in zip(parts, empty, strict=True)]
    return (filled if isinstance(made, list) else filled[0]), True


def _result(func: Any, args: Any, kwargs: Any, made: Any) -> Any:
    """The result of an operator whose choice is `made`."""
    name = _name(func)
    if name in _INDEXING:
        given = [
            part
            for index, places in zip(args[1], made, strict=True)
            for part in ([index] if places is None else places.unbind(1))
        ]
        return func(args[0], given, *args[2:], **kwargs)
    if name == "masked_select":
        return torch.broadcast_tensors(*args)[0][made[0].unbind(1)]
    if name in ("topk", "sort"):
        axis = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) if name == "topk" else 0
        return args[0].gather(axis, made), made.clone()
    # A copy: what is made of it in place must not change the choice.
    return tree_map_only(Tensor, torch.clone, made)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))  # pyright: ignore[reportUnknownArgumentType]
