"""From a name, or a function of the user's own, to a network."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tersenet.errors import TersenetError, UnknownNameError, nearest
from tersenet.models import zoo
from tersenet.models.registry import entry, in_zoo

# The largest value of each argument that may be overridden; the least is 1. They keep a forged or mistyped number from
# exhausting memory, and are far above any published network.
_LARGEST = {"classes": 100_000, "in_channels": 1024, "width": 256}


def build(name: str, **arguments: Any) -> nn.Module:
    """The network `name` with fresh weights: a built-in one, `timm:NAME` or `torchvision:NAME`.

    Args:
        classes: number of outputs.
        in_channels: channels of the images.
        width: channels of the first stage; all other layers scale with it.

    These are for built-in networks, which are built on torch's default device, also `meta`. Those of timm and
    torchvision take arguments of their own: `ARGUMENTS` of `zoo_timm` and `zoo_torchvision`.

    Raises:
        UnknownNameError: a name or an argument that does not exist.
        TersenetError: an argument that is not in its range, or timm or torchvision are not installed.
    """
    if in_zoo(name):
        return zoo.entry(name).build(**arguments)
    found = entry(name)
    for argument, value in arguments.items():
        _check(name, argument, value)
    module, _, function = found.builder.partition(":")
    return getattr(importlib.import_module(module), function)(**found.arguments, **arguments)


def build_skeleton(name: str, **arguments: Any) -> nn.Module:
    """`build` without memory for weights: the parameters are on `meta`. For loading, which fills all of them.

    Raises: as `build`.
    """
    if in_zoo(name):
        return zoo.build_skeleton(name, **arguments)
    with torch.device("meta"):
        return build(name, **arguments)


def _check(name: str, argument: str, value: Any) -> None:
    if argument not in _LARGEST:
        hint = f"A model takes {', '.join(_LARGEST)}."
        raise UnknownNameError(f"argument of model {name!r}", argument, _LARGEST, hint)
    if type(value) is not int or not 1 <= value <= _LARGEST[argument]:
        raise TersenetError(f"model {name!r}: {argument}={value!r} must be an integer from 1 to {_LARGEST[argument]:,}")


def build_custom(spec: str) -> nn.Module:
    """What the user's own `package.module:function`, called without arguments, returns.

    The module may lie in the current working directory. It is the user's code: it is imported and run.

    Raises:
        TersenetError: no such module or function, an error in it, or a result that is not an nn.Module.
    """
    module, _, function = spec.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise TersenetError(f"model {spec!r} must have the form package.module:function")
    make = _attribute(_import(module, spec), function, spec)
    try:
        model = make()
    except Exception as error:
        raise TersenetError(f"model {spec!r}: {function}() raised {_text(error)}") from error
    if not isinstance(model, nn.Module):
        raise TersenetError(f"model {spec!r}: {function}() must return a torch.nn.Module, not {type(model).__name__}")
    return model


def _import(module: str, spec: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        # It stays there: the user's code may import more of its own when it runs.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise TersenetError(f"model {spec!r}: importing {module} raised {_text(error)}") from error
        raise TersenetError(
            f"model {spec!r}: no module {error.name!r}, neither installed nor in the current folder {here}"
        ) from error
    except Exception as error:
        raise TersenetError(f"model {spec!r}: importing {module} raised {_text(error)}") from error


def _attribute(module: ModuleType, function: str, spec: str) -> Callable[[], Any]:
    found = getattr(module, function, None)
    if callable(found):
        return found
    if found is not None:
        raise TersenetError(f"model {spec!r}: {function!r} is a {type(found).__name__}, not a function")
    near = nearest(function, [name for name, value in vars(module).items() if callable(value)])
    offer = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise TersenetError(f"model {spec!r}: module {module.__name__} ({module.__file__}) has no {function!r}{offer}")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
