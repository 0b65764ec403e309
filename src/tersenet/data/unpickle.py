"""Reading the dicts of bytes arrays in CIFAR's python archives, without ever running what a pickle asks for."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from tersenet.errors import TersenetError


class _Stub:
    """Stands for whatever a pickle asks to be made or called: keeps what it was given, and does nothing with it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The last is how Python 3 writes bytes into pickles that Python 2 can read.
_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


# The unpickler written in Python: the C one allocates by a memo number that the file may forge.
class _Unpickler(pickle._Unpickler):  # pyright: ignore
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise TersenetError(f"it asks for {module}.{name}, which no CIFAR batch needs; nothing of it was run")
        return _Stub


def read_dict(data: bytes, file: str) -> dict[str, Any]:
    """The pickled dict in `data`, keys as str; an array of bytes becomes a uint8 array of its shape.

    Raises:
        TersenetError: damaged, not a dict, or it asks for anything but numpy arrays; `file` is named.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, not a dict")
        named = {_text(key): item for key, item in value.items()}
    except TersenetError as error:
        raise TersenetError(f"{file} is no CIFAR batch: {error}. Download the archive again.") from error
    except Exception as error:
        raise TersenetError(f"{file} is damaged or no CIFAR batch: {type(error).__name__}: {error}.") from error
    # Other things than arrays are left as they are: no one looks at the batch's label or the file names.
    return {
        key: _array(item, file) if isinstance(item, _Stub) and item.state is not None else item
        for key, item in named.items()
    }


def _plain(value: Any) -> Any:
    """The bytes that Python 3 wrote as an encoded text, or the value itself."""
    return value.arguments[0].encode("latin1") if isinstance(value, _Stub) else value


def _text(value: Any) -> str:
    value = _plain(value)
    if not isinstance(value, (bytes, str)):
        raise ValueError(f"a {type(value).__name__} where a name belongs")
    return value.decode("latin1") if isinstance(value, bytes) else value


def _array(stub: _Stub, file: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """State of an ndarray: (version, shape, dtype, column order, content)."""
    try:
        _, shape, dtype, columns_first, content = stub.state
        if _text(dtype.arguments[0]) != "u1":
            raise ValueError("not an array of bytes")
        # Raises unless the content is exactly as large as the shape says.
        return np.frombuffer(_plain(content), np.uint8).reshape(shape, order="F" if columns_first else "C")
    except Exception as error:
        raise TersenetError(f"{file} is damaged or no CIFAR batch: its array can't be read: {error}.") from error
