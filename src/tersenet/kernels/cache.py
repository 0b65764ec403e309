"""Compiled code on disk: one file per algorithm and instruction set in the user's cache folder.

A file is its key, the checksum of what follows, and the object code. Whatever does not match is as good as absent: the
code is compiled again and the file replaced. A folder that can't be written costs the compilation in each process.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

from tersenet import atomic
from tersenet.errors import TersenetError

_MAGIC = b"tersenet kernels 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """Where compiled code is kept: TERSENET_CACHE, or the system's folder for caches."""
    if chosen := os.environ.get("TERSENET_CACHE"):
        return Path(chosen) / "kernels"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tersenet" / "kernels"


def read(name: str, key: bytes) -> bytes | None:
    """What was written under this name and key, if it is still whole."""
    try:
        data = _path(name).read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    head = _MAGIC + hashlib.sha256(key).digest()
    payload = data[len(head) + _DIGEST_BYTES :]
    return payload if data[: -len(payload) or None] == head + hashlib.sha256(payload).digest() else None


def write(name: str, key: bytes, payload: bytes) -> None:
    """Keep `payload`; where that is not possible, do nothing."""
    data = _MAGIC + hashlib.sha256(key).digest() + hashlib.sha256(payload).digest() + payload
    with suppress(TersenetError, RuntimeError):
        atomic.write_bytes(_path(name), data)


def _path(name: str) -> Path:
    return folder() / f"{name}.bin"
