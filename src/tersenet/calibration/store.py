"""Tensors kept by name for the time of a step: the first of them in memory, what is more in files."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from tersenet.graph.trace import tensors_in

_MEMORY = 1 << 30
"""Bytes of each store. What is beyond goes to files, so that memory does not grow with the number of images."""


class Store:
    """Tensors, or containers of them, by name. The files are deleted with the object.

    What `get` gives is the caller's own: the network may write into it.
    """

    def __init__(self, memory: int = _MEMORY) -> None:
        self._left, self._known = memory, dict[str, Any]()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, name: str, value: Any) -> None:
        """Keep `value`, which the caller gives up, in place of what had this name."""
        if name in self._known:
            self._left += _bytes(self._known.pop(name))
        size = _bytes(value)
        # Memory of a GPU is the network's.
        if size <= self._left and all(x.device.type == "cpu" for x in tensors_in(value)):
            self._left -= size
            self._known[name] = value
            return
        # Of torch's two formats the older one makes no checksums, which take longer than writing.
        torch.save(value, self._file(name), _use_new_zipfile_serialization=False)

    def get(self, name: str) -> Any:
        """A copy of what was put there, on the device that it came from."""
        if name in self._known:
            return copy.deepcopy(self._known[name])
        return torch.load(self._file(name), weights_only=True)

    def _file(self, name: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tersenet-")
        return Path(self._folder.name) / f"{name}.pt"


def _bytes(value: Any) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors_in(value))
