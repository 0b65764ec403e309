"""`timm:NAME` and `torchvision:NAME`: networks of two libraries, built by name and a few plain arguments.

Such a name can stand in a saved folder, and loading one builds it again. So only what is listed here passes: names that
the library itself lists, and arguments that are numbers in a range or flags. No file, no address, no code.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from tersenet.data.registry import MeanStd
from tersenet.errors import TersenetError, UnknownNameError
from tersenet.measuring.meta import tensors_in
from tersenet.models import zoo_timm, zoo_torchvision

_NAME = re.compile(r"[A-Za-z]\w*(\.\w+)?", re.ASCII)
_LARGEST = {"classes": 100_000, "channels": 1024, "pixels": 8192}


class Library(Protocol):
    """What a module such as `zoo_timm` has."""

    ARGUMENTS: Mapping[str, str]
    """argument -> `classes`, `channels`, `pixels` (integers from 1), `share` (0 to 1) or `flag`"""

    def load(self) -> None:
        """Import the library. Raises: ImportError."""
        ...

    def names(self) -> Sequence[str]: ...

    def known(self, name: str) -> bool: ...

    def build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module: ...

    def shape(self, name: str, model: nn.Module) -> tuple[int, ...] | None:
        """(C, H, W) of the images that `model` was made for, if that is known."""
        ...

    def normalise(self, name: str) -> MeanStd | None:
        """What the published weights of this name were trained with, if it is known."""
        ...

    def fitted(self, name: str, shape: tuple[int, ...] | None, classes: int | None, trained: bool) -> dict[str, Any]:
        """The arguments that make a network for these data; `trained`: for weights that are going to be loaded."""
        ...


_LIBRARIES = cast(dict[str, Library], {"timm": zoo_timm, "torchvision": zoo_torchvision})


@dataclass(frozen=True)
class Entry:
    """One network of a library; `spec` is its whole name, such as `timm:resnet18`."""

    spec: str
    library: Library
    name: str

    def build(self, **arguments: Any) -> nn.Module:
        """The network with fresh weights. Raises: TersenetError, UnknownNameError."""
        for argument, value in arguments.items():
            _check(self, argument, value)
        try:
            return self.library.build(self.name, arguments)
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise TersenetError(f"model {self.spec!r} can't be built with ({given}): {reason}") from error

    def shape(self, model: nn.Module) -> tuple[int, ...] | None:
        return self.library.shape(self.name, model)

    def normalise(self) -> MeanStd | None:
        return self.library.normalise(self.name)

    def fitted(self, shape: tuple[int, ...] | None, classes: int | None, trained: bool) -> dict[str, Any]:
        return self.library.fitted(self.name, shape, classes, trained)


def entry(spec: str) -> Entry:
    """Raises: UnknownNameError, with the nearest names; TersenetError if the library is not installed."""
    package, name = spec.split(":", 1)
    library = _loaded(package, f"model {spec!r}")
    if not _NAME.fullmatch(name) or not library.known(name):
        hint = f"`tersenet models '{package}:*'` lists them all."
        raise UnknownNameError(f"model of {package}", name, library.names(), hint)
    return Entry(spec, library, name)


def names(package: str) -> list[str]:
    """All that a library has, as `timm:NAME`. Raises: TersenetError if it is not installed."""
    return [f"{package}:{name}" for name in _loaded(package, f"listing {package}'s models").names()]


def build_skeleton(spec: str, **arguments: Any) -> nn.Module:
    """The network without memory for weights, its parameters on `meta`; what no state dict fills is real.

    A few networks run themselves while they are built, which takes weights: those few have theirs, and the memory.

    Raises: as `Entry.build`.
    """
    found = entry(spec)
    # What is drawn while building (positions that become parameters) must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        try:
            with _parameters_on_meta():
                model = found.build(**arguments)
        except TersenetError:
            return found.build(**arguments)
        return found.build(**arguments) if _lacks_values(model) else model


def _lacks_values(model: nn.Module) -> bool:
    """Whether a tensor that loading does not fill took its device from a parameter: an attention mask, say."""
    filled = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    tensors = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
    return any(tensor.is_meta and id(tensor) not in filled for tensor in tensors)


@contextmanager
def _parameters_on_meta() -> Generator[None]:
    """In this context, what becomes a parameter of a module is moved to `meta` at once.

    Not `torch.device("meta")`: these libraries compute with values while they build, and keep tensors that no state
    dict holds. Those have to be real.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _loaded(package: str, needed_by: str) -> Library:
    library = _LIBRARIES[package]
    try:
        library.load()
    except ImportError as error:
        missing = error.name or package
        raise TersenetError(
            f"{needed_by} needs {missing}, which is not installed: pip install 'tersenet[zoo]'"
        ) from error
    return library


def _check(entry: Entry, argument: str, value: Any) -> None:
    allowed = entry.library.ARGUMENTS
    if argument not in allowed:
        raise UnknownNameError(f"argument of model {entry.spec!r}", argument, allowed, f"Known: {', '.join(allowed)}.")
    kind = allowed[argument]
    problem = f"model {entry.spec!r}: {argument}={value!r} must be "
    if kind == "flag":
        if type(value) is not bool:
            raise TersenetError(problem + "true or false")
    elif kind == "share":
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise TersenetError(problem + "a number from 0 to 1")
    elif type(value) is not int or not 1 <= value <= _LARGEST[kind]:
        raise TersenetError(problem + f"an integer from 1 to {_LARGEST[kind]:,}")
