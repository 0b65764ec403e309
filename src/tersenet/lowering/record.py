"""The operators that a network calls, written down while it runs on tensors that have sizes but no numbers.

torch.export does this too, for more networks, but takes seconds, most of them for parts of torch that nothing else
needs. Here a fallback of torch's dispatcher sees every call before torch takes it apart: a convolution is `conv2d` and
not what that is made of, and a custom operator is one call. There are no numbers: whoever asks for one gets an error
from torch, and that is the end of the recording.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.utils import _pytree as pytree

from tersenet.lowering.shapes import result_of

_aten = torch.ops.aten
_SAME = frozenset([_aten.lift_fresh.default, _aten.alias.default, _aten.detach.default, _aten.detach_.default])
"""Operators that give their argument back, as far as numbers and memory go."""
_DROPOUTS = frozenset(
    getattr(_aten, name).default
    for kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for name in (kind, f"{kind}_")
)
"""They do too, in evaluation mode."""
_CPU, _META = torch.device("cpu"), torch.device("meta")
_PLAIN: tuple[type, ...] = (Tensor, nn.Parameter)


class Refused(Exception):
    """What a network does can't be written down here."""


@dataclass(frozen=True)
class Ref:
    """A tensor in a recording, by its number: inputs first, then what operators made."""

    slot: int


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that was there before the pass, or was made outside of torch's operators: a parameter, a table."""

    value: Tensor


@dataclass(frozen=True)
class Call:
    """An operator as the network called it. `result`: `Ref`s in the structure that it returned; `module`: the path of
    the innermost module whose code called it."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    module: str


@dataclass
class Recording:
    """One pass. `shapes`: a tensor of torch's meta device for each number of a `Ref`."""

    inputs: int
    calls: list[Call] = field(default_factory=list[Call])
    shapes: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Any] = field(default_factory=list[Any])
    structure: pytree.TreeSpec | None = None


class Shaped(Tensor):
    """A tensor of torch's meta device: sizes, and no memory to read. While a network is recorded it says that it is on
    the CPU, where the network's code expects it."""

    made_in: Recording
    slot: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls: type[Shaped], like: Tensor, made_in: Recording) -> Shaped:
        self: Shaped = Tensor._make_subclass(cls, like)  # pyright: ignore
        torch._C._set_throw_on_mutable_data_ptr(self)  # pyright: ignore
        self.made_in, self.slot = made_in, len(made_in.shapes)
        made_in.shapes.append(like)
        return self

    @property
    def device(self) -> torch.device:  # pyright: ignore
        return _CPU if _recorder() is not None else _META

    @property
    def is_cpu(self) -> bool:  # pyright: ignore
        return _recorder() is not None

    @property
    def is_meta(self) -> bool:  # pyright: ignore
        return _recorder() is None


def record(model: nn.Module, inputs: tuple[Tensor, ...], paths: dict[int, str], most: int | None = None) -> Recording:
    """What `model(*inputs)` calls. No tensor changes; attributes of the network may hold tensors without numbers
    afterwards.

    Args:
        inputs: on torch's meta device.
        paths: id of a module -> its path.
        most: refuse more calls than that.

    Raises:
        Refused: a type of tensor, operator or context that is not understood.
        Exception: whatever the network, or torch, raises where numbers are asked for.
    """
    recorder = _Recorder(len(inputs), paths, most)
    images = [Shaped(x, recorder.found) for x in inputs]
    with recorder.active():
        output = model(*images)
    leaves, recorder.found.structure = pytree.tree_flatten(output)
    recorder.found.outputs = [recorder.taken(leaf)[0] for leaf in leaves]
    return recorder.found


def _shape_of(tensor: Tensor) -> Tensor:
    """`tensor` without its numbers. Raises: Refused where that would not say all that decides about operators."""
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.is_quantized:
        raise Refused(f"a tensor of type {type(tensor).__name__}, {tensor.layout}, {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
        raise Refused(f"a tensor on {tensor.device}, or one that is conjugated or negated when it is read")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Recorder:
    def __init__(self, inputs: int, paths: dict[int, str], most: int | None) -> None:
        self.found = Recording(inputs)
        self._paths, self._most = paths, most
        # Holds the tensors too, so that no other one gets the id.
        self._constants: dict[int, tuple[Constant, Tensor]] = {}

    @contextmanager
    def active(self) -> Generator[None]:
        with _one_at_a_time:  # torch takes one fallback for a key, and two threads may be the first
            key = _fallback()[0]
        before, _here.recorder = _recorder(), self
        try:
            with torch._C._IncludeDispatchKeyGuard(key):  # pyright: ignore
                yield
        finally:
            _here.recorder = before

    def taken(self, value: Any) -> tuple[Any, Any]:
        """An argument as it is written down, and as it is without numbers."""
        if isinstance(value, Shaped):
            if value.made_in is not self.found:
                raise Refused("a tensor that an earlier pass has left")
            return Ref(value.slot), self.found.shapes[value.slot]
        if isinstance(value, Tensor):
            known = self._constants.get(id(value))
            if known is None:
                known = self._constants[id(value)] = Constant(value), _shape_of(value)
            return known
        if isinstance(value, (list, tuple)):
            pairs = [self.taken(one) for one in value]  # pyright: ignore
            return [one for one, _ in pairs], [one for _, one in pairs]
        if isinstance(value, torch.device):
            if value.type not in ("cpu", "meta"):  # meta: torch has looked at a tensor itself
                raise Refused(f"a tensor on {value}")
            return _CPU, _META
        return value, value

    def see(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_autocast_enabled("cpu"):
            raise Refused("autocast")
        if operator in _SAME or (operator in _DROPOUTS and not args[2]):
            return args[0]
        written, shapes = self.taken(args)
        named = {name: self.taken(value) for name, value in kwargs.items()}
        keywords = {name: value for name, (_, value) in named.items()}
        result = result_of(operator, shapes, keywords)
        if result is None:
            result = operator(*shapes, **keywords)
        if operator._schema.is_mutable:
            returned = self._changed(operator, args, result)
            made: Any = Ref(returned.slot)
        else:
            returned, made = self._returned(result)
        if len(self.found.calls) == self._most:
            raise Refused("more operators for another batch size")
        keywords = {name: value for name, (value, _) in named.items()}
        self.found.calls.append(Call(operator, tuple(written), keywords, made, self._path(inspect.currentframe())))
        return returned

    def _returned(self, result: Any) -> tuple[Any, Any]:
        """New tensors for what an operator made, and how they are written down."""
        if isinstance(result, Tensor):
            returned = Shaped(result, self.found)
            return returned, Ref(returned.slot)
        if isinstance(result, (list, tuple)) and result:
            pairs = [self._returned(one) for one in result]  # pyright: ignore
            return type(result)(one for one, _ in pairs), [one for _, one in pairs]  # pyright: ignore
        if result is None:
            return None, None
        raise Refused(f"an operator that returns {type(result).__name__}")

    def _changed(self, operator: Any, args: tuple[Any, ...], result: Any) -> Shaped:
        """The tensor that an operator such as `relu_` has changed: from now on it is the operator's result."""
        [*changed] = [a for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        first = args[0] if args else None
        if len(changed) != 1 or changed[0] is not operator._schema.arguments[0] or not isinstance(first, Shaped):
            raise Refused(f"{operator} changes more than the result of another operator")
        if not isinstance(result, Tensor) or result.shape != first.shape or result.stride() != first.stride():
            raise Refused(f"{operator} changes a tensor's size")
        first.slot = len(self.found.shapes)
        self.found.shapes.append(result)
        return first

    def _path(self, frame: FrameType | None) -> str:
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                path = self._paths.get(id(frame.f_locals.get("self")))
                if path is not None:
                    return path
            frame = frame.f_back
        return ""


_here = threading.local()
_one_at_a_time = threading.Lock()


def _recorder() -> _Recorder | None:
    """The one that is active in this thread."""
    return getattr(_here, "recorder", None)


@cache
def _fallback() -> tuple[Any, Library]:
    """The dispatcher's key for programs outside of torch that put operators off to run them later, with a fallback for
    all operators. Calls come by only inside of `_Recorder.active`. The library has to be kept, or the fallback goes.

    torch has no operators of its own for this key, and leaves it aside where it fills tensors with numbers from Python.
    """
    key = torch._C._parse_dispatch_key("DeferredInit")  # pyright: ignore
    library = Library("_", "IMPL")
    keys = torch._C.DispatchKeySet(key)  # pyright: ignore

    def fallback(operator: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):  # pyright: ignore
            return _here.recorder.see(operator, args, kwargs)

    library.fallback(fallback, "DeferredInit")
    return key, library
