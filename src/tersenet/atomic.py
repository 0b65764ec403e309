"""Files that are either whole or not there: written beside their place, synced, then moved onto it."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tersenet.errors import TersenetError


@contextmanager
def replace(path: Path) -> Generator[Path]:
    """Yield a temporary path in `path`'s folder; on success it takes `path`'s place, on any failure it is removed.

    Raises:
        TersenetError: the disk is full or the folder can't be written; what was at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        # After a success the temporary name no longer exists; where nothing can be written, nothing is to be removed.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def unwritten(path: Path, error: OSError) -> TersenetError:
    """The one message for whatever keeps a file from being written."""
    return TersenetError(
        f"could not write {path}: {error.strerror or error}. What was there before is unchanged; "
        "free some space or choose another folder with --out."
    )


def remove_leftovers(folder: Path, file: str) -> None:
    """Remove the temporary files of `file`, a path or pattern in `folder`, that killed processes left."""
    place, _, name = file.rpartition("/")
    for leftover in folder.glob(f"{place}/.{name}.*.tmp" if place else f".{name}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    with replace(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
