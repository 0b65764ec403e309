"""A smaller copy of a network beside the trace: whether its operators make what the labels say.

What a copy computes with has to stay, too: a number that its code makes of a number of channels would be another one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from tersenet.graph.choices import repeating
from tersenet.graph.dispatch import Dispatch
from tersenet.graph.mend import Sizes
from tersenet.graph.shapes import on_meta
from tersenet.graph.trace import SAME, Trace, first_line, running, same_operator, tensors_in

_OTHERS = "its operators depend on the number of channels"


class _Stale(Exception):
    """The copy does something else than the labels say, from this operator on."""

    def __init__(self, op: int, why: str) -> None:
        super().__init__(why)
        self.op = op


class _Compare(Dispatch):
    """Checks every operator of the smaller copy against the trace."""

    def __init__(self, trace: Trace, sizes: Sizes, empty: bool) -> None:
        """Args: empty: the copy and its inputs are on `meta`."""
        super().__init__()
        self.trace = trace
        self.sizes = sizes
        self.empty = empty
        self.number = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SAME:
            return func(*args, **(kwargs or {}))
        self.number += 1
        if self.number >= len(self.trace.ops) or not same_operator(self.trace.ops[self.number].func, func):
            raise _Stale(min(self.number, len(self.trace.ops) - 1), _OTHERS)
        shapes = self.sizes.expected(self.number)
        labelled = any(shape is not None for shape in shapes)
        self._check_numbers(args, kwargs or {}, labelled)
        result: Any = on_meta(func, args, kwargs or {}) if self.empty else func(*args, **(kwargs or {}))
        results: list[Any] = list(result) if isinstance(result, (list, tuple)) else [result]
        if labelled and len(shapes) != len(results):
            raise _Stale(self.number, f"it makes {len(results)} tensors in place of {len(shapes)}")
        for made, shape in zip(results, shapes, strict=False):
            if isinstance(made, Tensor) and shape is not None and not _fits(made, shape):
                raise _Stale(self.number, f"it makes the shape {tuple(made.shape)} in place of {shape}")
        return result

    def _check_numbers(self, args: Any, kwargs: Any, labelled: bool) -> None:
        """Whole numbers count where the result has channels: others may well be sizes that are calculated with."""
        op = self.trace.ops[self.number]
        for place, (name, is_value) in enumerate(_arguments(op.func)):
            old, new = (
                given[place] if place < len(given) else named.get(name)
                for given, named in ((op.args, op.kwargs), (args, kwargs))
            )
            kinds = (int, float) if is_value and labelled else float
            if isinstance(old, kinds) and isinstance(new, kinds) and old != new:
                raise _Stale(self.number, f"it computes with {new:.4g} in place of {old:.4g}")


@lru_cache(maxsize=4096)
def _arguments(func: Any) -> tuple[tuple[str, bool], ...]:
    """Names of an operator's arguments, and which it computes with if they are numbers: no sizes, axes or counts.
    Tensors are among these, since a number may be given in the place of one."""
    taken = func._schema.arguments
    return tuple((one.name, str(one.type) in ("Tensor", "number", "Optional[number]")) for one in taken)


def _fits(made: Tensor, shape: tuple[int, ...]) -> bool:
    return made.dim() == len(shape) and all(b in (-1, a) for a, b in zip(made.shape, shape, strict=True))


def first_difference(copy: nn.Module, example: Any, trace: Trace, sizes: Sizes) -> tuple[int, str] | None:
    """The operator at which a smaller copy leaves what the labels say, and how; None if it never does."""
    compare = _Compare(trace, sizes, empty=tensors_in(example)[0].is_meta)
    try:
        with running(copy), repeating(tensors_in(example), trace.choices), compare:
            copy(*example)
        if compare.number + 1 < len(trace.ops):
            return compare.number + 1, _OTHERS
    except _Stale as stale:
        return stale.op, str(stale)
    except Exception as error:
        return max(0, min(compare.number, len(trace.ops) - 1)), first_line(error)
    return None
