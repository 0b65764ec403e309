"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tersenet import atomic
from tersenet.errors import TersenetError


def test_a_file_and_its_folders_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    atomic.write_json(path, {"ü": 1})
    assert path.read_bytes() == '{\n  "ü": 1\n}\n'.encode()
    atomic.write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic.replace(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["mkdir", "write_bytes", "fsync", "replace"])
def test_a_full_disk_at_every_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path if place in ("mkdir", "write_bytes") else os, place, full)
    with pytest.raises(TersenetError, match=r"could not write .*file: No space left on device\. .*unchanged"):
        atomic.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TersenetError, match="could not write"):
        atomic.write_text(tmp_path / "file" / "below", "text")
    with pytest.raises(TersenetError, match="File name too long"):
        atomic.write_text(tmp_path / ("x" * 300), "text")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "file", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    for name in (".file.12.tmp", "sub/.file.3.tmp", "sub/.other.3.tmp", "file", ".file.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    atomic.remove_leftovers(tmp_path, "file")
    atomic.remove_leftovers(tmp_path, "*/file")
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"file", ".file.tmp", "sub/.other.3.tmp"}
