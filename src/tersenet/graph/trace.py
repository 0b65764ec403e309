"""A network as a flat list of operators: what ran in one forward pass, seen from the dispatcher.

The network is really run, so whatever runs can be traced, also where Python looks at values. (Before it does,
convolutions and products of matrices make zeros: until then only shapes count.) What is seen are the operators that
remain when torch has taken its composite ones apart: some eighty of them make up all convolutional networks.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph import lookup
from tersenet.graph.choices import Choice, Choices, is_choice
from tersenet.graph.dispatch import Dispatch
from tersenet.graph.passes import children, evaluating, tensors_in
from tersenet.graph.shapes import PRODUCTS, empty_product
from tersenet.graph.undo import structure_of
from tersenet.nn.adapter import ChannelAdapter
from tersenet.nn.winograd_quantizer import directly

_aten = torch.ops.aten
SAME = frozenset([_aten.detach.default, _aten.alias.default, _aten.clone.default])
"""Operators that are not counted: the same values. How often torch copies depends on sizes and memory order."""
_VIEWS = frozenset([_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default])


def same_operator(a: Any, b: Any) -> bool:
    """Whether two functions of the dispatcher do the same; a view may be of a copy or not."""
    return a is b or (a in _VIEWS and b in _VIEWS)


@dataclass(frozen=True)
class Ref:
    """A tensor in an operator's arguments or results, by its number."""

    slot: int


@dataclass
class Slot:
    """What is known of a tensor. `parameter` is the canonical name of a parameter or buffer; `content` are the values
    of constants and of integer results, such as index tables. `mask`: truth values, which as an index are a mask."""

    shape: tuple[int, ...]
    floating: bool
    parameter: str | None = None
    content: Tensor | None = None
    mask: bool = False


@dataclass(frozen=True)
class Place:
    """The line of the user's code that ran an operator, and the module whose forward that was."""

    file: str = ""
    line: int = 0
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}" if self.file else ""


@dataclass
class Op:
    """One operator. `name` is `relu` for `aten.relu_`; tensors in `args` and `result` are `Ref`s."""

    number: int
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    place: Place


@dataclass
class Trace:
    """What ran. `inputs` are the example's tensors in order, `outputs` the result with `Ref`s for tensors.

    `images` are inputs (C, H, W) in a list, without a batch axis. `choices` are those that were made by values or of
    constants; those by values begin at the operator `chosen_from`. `cuts`: operator -> whether a run that goes on there
    was seen to give the same.
    """

    ops: list[Op] = field(default_factory=list[Op])
    slots: list[Slot] = field(default_factory=list[Slot])
    inputs: tuple[int, ...] = ()
    images: frozenset[int] = frozenset()
    outputs: Any = None
    choices: list[Choice] = field(default_factory=list[Choice])
    chosen_from: int | None = None
    cuts: dict[int, bool] = field(default_factory=dict[int, bool])

    @property
    def parameters(self) -> set[str]:
        """Canonical names of the parameters and buffers that were used."""
        return {slot.parameter for slot in self.slots if slot.parameter is not None}

    @cached_property
    def readers(self) -> dict[Ref, list[Op]]:
        """Tensor -> the operators that read it."""
        found: dict[Ref, list[Op]] = {}
        for op in self.ops:
            for ref in dict.fromkeys(refs_in([op.args, op.kwargs])):
                found.setdefault(ref, []).append(op)
        return found


@contextmanager
def running(model: nn.Module) -> Generator[None]:
    """How networks are run here: in evaluation mode, without gradients and without fused attention modules; Winograd
    and quantized layers as the convolutions that they stand for. Afterwards the network is as it was."""
    modules = lookup.named_modules(model).values()
    for module in modules:
        if isinstance(module, ChannelAdapter):
            module.forget()
    training = any(module.training for module in modules)
    # What a pass keeps for later ones, such as anchors or masks of a size, every pass makes anew.
    restore = structure_of(model)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with directly(), evaluating(model) if training else nullcontext(), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        restore()


def trace(model: nn.Module, example: tuple[Any, ...]) -> Trace:
    """The operators that `model(*example)` runs, in evaluation mode. The model is not changed.

    Raises:
        GraphError: the network does not run on the example, with the line of the user's code where that was seen.
    """
    recorder = _Recorder(model, example)
    with suppress(_Choosing):
        found = _recorded(model, example, recorder)
        if not recorder.choosing:
            return found
    try:
        return _chosen_trace(model, example, never_nothing=True)
    except _Invented:
        return _chosen_trace(model, example, never_nothing=False)


class _Choosing(Exception):
    """The network chooses by values, which has to be written down: that costs time, and most don't."""


class _Invented(Exception):
    """The network failed after a choice of nothing was made one of something."""


def _chosen_trace(model: nn.Module, example: tuple[Any, ...], never_nothing: bool) -> Trace:
    choices = Choices(tensors_in(example), never_nothing=never_nothing)
    try:
        with choices:
            return _recorded(model, example, _Recorder(model, example, choices))
    except GraphError as error:
        if choices.filled:
            raise _Invented from error
        raise


def _recorded(model: nn.Module, example: tuple[Any, ...], recorder: _Recorder) -> Trace:
    try:
        with running(model), recorder:
            output = model(*example)
    except _Choosing:
        raise
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} can't be traced{user_line(error)}: {first_line(error)}. The example input has "
            f"shape {[tuple(x.shape) for x in example if isinstance(x, Tensor)]}; check it, and that the network and "
            "the example are on one device"
        ) from error
    return recorder.finish(output)


def refs_in(value: Any) -> list[Ref]:
    """All tensors in an operator's arguments or in a trace's outputs."""
    return [value] if isinstance(value, Ref) else [ref for item in children(value) for ref in refs_in(item)]


def _zeros_of(func: Any, args: Any) -> Tensor:
    """What an operator makes, but zeros: as long as nothing is chosen by values, only the shape counts."""
    made = empty_product(func, args)
    if made is not None:
        return made.zero_()
    like = func(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=args[0].device).zero_()


class _Recorder(Dispatch):
    """Writes operators down. Without `choices` it stops at the first choice by values."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...], choices: Choices | None = None) -> None:
        super().__init__()
        self.found = Trace(choices=choices.made if choices is not None else [])
        self.choosing = False
        self._choices = choices
        self._names = lookup.names_of_tensors(model)
        self._paths = {id(module): path for path, module in lookup.named_modules(model).items()}
        self._slots: dict[int, int] = {}
        # Keeps every tensor alive, so that no other one gets its id.
        self._alive: list[Tensor] = []
        self._kept: dict[int, Tensor] = {}
        self.found.inputs = tuple(self._slot(x) for x in tensors_in(example))
        listed = [x for part in example if isinstance(part, (list, tuple)) for x in part]  # pyright: ignore
        self.found.images = frozenset(self._slot(x) for x in listed if isinstance(x, Tensor) and x.dim() == 3)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._choices is None and is_choice(func, args):
            self.choosing = True
            raise _Choosing
        skipped = self._choices is None and func in PRODUCTS
        result = _zeros_of(func, args) if skipped else func(*args, **(kwargs or {}))
        if self.found.chosen_from is None and any(choice.by_values for choice in self.found.choices[-1:]):
            self.found.chosen_from = len(self.found.ops)
        if func in SAME:
            self._slots[id(result)] = self._slot(args[0])
            self._alive.append(result)
            return result
        taken = self.refer(args), self.refer(kwargs or {})
        name = func._schema.name.rsplit("::", 1)[-1]
        self.found.ops.append(
            Op(
                number=len(self.found.ops),
                name=name.removesuffix("_"),
                func=func,
                args=tuple(taken[0]),
                kwargs=taken[1],
                result=self.refer(result, made=True),
                place=self._place(inspect.currentframe()),
            )
        )
        return result

    def finish(self, output: Any) -> Trace:
        """The trace. Contents are copied only now: here no operator is seen any more."""
        self.found.outputs = self.refer(output)
        for slot, tensor in self._kept.items():
            self.found.slots[slot].content = tensor.detach().cpu()
        return self.found

    def refer(self, value: Any, made: bool = False) -> Any:
        """`value` with a `Ref` for every tensor. `made`: by an operator."""
        if isinstance(value, Tensor):
            return Ref(self._slot(value, made))
        if isinstance(value, dict):
            return {k: self.refer(v, made) for k, v in value.items()}  # pyright: ignore
        if isinstance(value, (list, tuple)) or hasattr(value, "__dataclass_fields__"):
            return [self.refer(v, made) for v in children(value)]
        return value

    def _slot(self, tensor: Tensor, made: bool = False) -> int:
        known = self._slots.get(id(tensor))
        if known is not None:
            return known
        self._slots[id(tensor)] = len(self.found.slots)
        self._alive.append(tensor)
        name = self._names.get(id(tensor), (None,))[0]
        floating = tensor.is_floating_point()
        small = tensor.numel() <= 1 << 22 and not tensor.is_meta
        if small and (not floating if made or name else True):
            self._kept[len(self.found.slots)] = tensor
        self.found.slots.append(Slot(tuple(tensor.shape), floating, name, mask=tensor.dtype == torch.bool))
        return self._slots[id(tensor)]

    def _place(self, frame: FrameType | None) -> Place:
        """The innermost line outside torch, and the innermost module of the network."""
        file, line = "", 0
        while frame is not None:
            code = frame.f_code
            if not file and "/torch/" not in code.co_filename and "tersenet/graph" not in code.co_filename:
                file, line = code.co_filename, frame.f_lineno
            if code.co_varnames[:1] == ("self",) and code.co_name != "__torch_dispatch__":
                path = self._paths.get(id(frame.f_locals.get("self")))
                if path is not None:
                    # A layer of torch: the user's line is further out.
                    return Place(file, line, path) if file else self._outer(frame, path)
            frame = frame.f_back
        return Place(file, line)

    def _outer(self, frame: FrameType, path: str) -> Place:
        outer: FrameType | None = frame
        while outer is not None:
            name = outer.f_code.co_filename
            if "/torch/" not in name and "tersenet/graph" not in name:
                return Place(name, outer.f_lineno, path)
            outer = outer.f_back
        return Place(module=path)


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def user_line(error: BaseException) -> str:
    """` (at net.py:12)`: the innermost line outside torch and this package, if there is one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if "tersenet/graph" not in f.filename]
    return f" (at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
