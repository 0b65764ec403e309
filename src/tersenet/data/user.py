"""A user's own data: a function named `package.module:function`, or loaders and dicts given through the API."""

from __future__ import annotations

import importlib
import operator
import os
import sys
import traceback
from typing import Any, cast

from tersenet.data.bundle import Data, Loader, LoaderAdapter, first_tensor
from tersenet.data.registry import unknown
from tersenet.errors import TersenetError, UnknownNameError

KEYS = ("train", "validation", "test", "loss", "metric", "classes", "shape")
_EXPECTED = f"return a Data, a pair (train_loader, test_loader), or a dict with some of: {', '.join(KEYS)}"


def call(spec: str) -> Any:
    """What the user's function `package.module:function` returns, called without arguments.

    The current folder is searched last, so that a file lying there can be named without being able to hide a package.

    Raises:
        UnknownNameError: no such module or function.
        TersenetError: the import or the function failed; the message has the place.
    """
    module_name, _, path = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise unknown(module_name) from error
        raise _failed(f"importing {module_name}", error) from error
    except Exception as error:
        raise _failed(f"importing {module_name}", error) from error
    for name in path.split("."):
        if not hasattr(value, name):
            raise UnknownNameError("function", name, dir(value), f"{module_name} has no {path!r}.")
        value = getattr(value, name)
    if not callable(value):
        raise TersenetError(f"data {spec!r} is a {type(value).__name__}; it must be a function of no arguments.")
    try:
        return value()
    except TersenetError:
        raise
    except Exception as error:
        raise _failed(f"{spec}()", error) from error


def _failed(what: str, error: Exception) -> TersenetError:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return TersenetError(f"data: {what} failed: {type(error).__name__}: {error} ({place.filename}:{place.lineno})")


def bundle(value: Any, name: str, *, seed: int = 0, rank: int = 0, world: int = 1) -> Data:
    """`Data` from what a user gives: `Data` itself, a (train, test) pair, a dict, or one loader, which is a test set.

    The shape is that of the first batch unless given. Nothing is split off: what a user has no validation set for has
    none.

    Raises:
        UnknownNameError: a key of the dict.
        TersenetError: something is no loader, the shape can't be told, a loss or metric is no function, or classes no
            number.
    """
    if isinstance(value, Data):
        return value
    parts = _parts(value, name)
    for key in ("loss", "metric"):
        if parts.get(key) is not None and not callable(parts[key]):
            raise TersenetError(f"{name}: {key} (={parts[key]!r}) must be a function of (outputs, targets).")
    loaders: dict[str, Loader] = {}
    for key in ("train", "validation", "test"):
        loader = parts.get(key)
        if loader is not None:
            loaders[key] = (
                loader
                if isinstance(loader, Loader)
                else LoaderAdapter(
                    loader, name=f"{name}: {key}", train=key == "train", seed=seed, rank=rank, world=world
                )
            )
    if not loaders:
        raise TersenetError(f"{name}: there is no train, validation or test loader; {_EXPECTED}.")
    shape = _shape(parts.get("shape"), next(iter(loaders.values())), name)
    return Data(
        name=name,
        train=loaders.get("train"),
        validation=loaders.get("validation"),
        test=loaders.get("test"),
        classes=_classes(parts, name),
        shape=shape,
        normalise=None,
        loss=parts.get("loss"),
        metric=parts.get("metric"),
    )


def _parts(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        for key in cast(dict[Any, Any], value):
            if key not in KEYS:
                raise UnknownNameError("data key", str(key), KEYS, f"{name} may have: {', '.join(KEYS)}.")
        return cast(dict[str, Any], value)
    if isinstance(value, tuple):
        if len(cast(tuple[Any, ...], value)) != 2:
            raise TersenetError(f"{name}: a tuple of {len(cast(tuple[Any, ...], value))}; {_EXPECTED}.")
        train, test = cast(tuple[Any, Any], value)
        return {"train": train, "test": test}
    if hasattr(value, "__iter__") or isinstance(value, Loader):
        return {"test": value}
    raise TersenetError(f"{name}: a {type(value).__name__}; {_EXPECTED}.")


def _shape(given: Any, loader: Loader, name: str) -> tuple[int, ...]:
    if given is None:
        first = loader.first if isinstance(loader, LoaderAdapter) else next(iter(loader.batches(0)))
        inputs = first_tensor(first[0])
        if inputs.ndim < 2:
            raise TersenetError(
                f"{name}: the first batch's inputs are {tuple(inputs.shape)}, not (N, ...) such as (N, C, H, W): a "
                "loader gives batches, and inputs of at least one dimension."
            )
        given = inputs.shape[1:]
    try:
        shape = tuple(map(operator.index, given))
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        raise TersenetError(f"{name}: shape (={given!r}) must be the whole numbers of one input, such as (C, H, W).")
    return shape


def _classes(parts: dict[str, Any], name: str) -> int | None:
    """As given, or as the training or test dataset lists them, the way torchvision's do."""
    given = parts.get("classes")
    if given is not None:
        try:
            classes = operator.index(given)
        except TypeError:
            classes = 0
        if classes < 1:
            raise TersenetError(f"{name}: classes (={given!r}) must be how many there are, a whole number.")
        return classes
    for key in ("train", "test"):
        listed = getattr(getattr(parts.get(key), "dataset", None), "classes", None)
        if isinstance(listed, (list, tuple)):
            return len(cast(list[Any], listed))
    return None
