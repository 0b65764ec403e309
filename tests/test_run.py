"""The folder of a run: what may go on in it, and what --fresh takes away."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from run_support import files
from tersenet import atomic, run
from tersenet.errors import ArtifactError, TersenetError
from tersenet.results import Measures, StepResult
from tersenet.run import Run

REQUEST = {"model": "resnet8", "recipe": {"steps": [{"rate": 0.4}], "seed": 0}}
RESULT = StepResult(
    index=0, method="train", settings={}, seconds=1.0, after=Measures(params=1, macs=2, bytes=4), curves=[]
)


def written(folder: Path) -> Run:
    """A run with something of every kind in it."""
    found = Run(folder, REQUEST)
    found.write("recipe.yaml", "steps: []")
    found.write("before/measures.json", RESULT.after.model_dump_json())
    found.event({"event": "note"})
    for place in ("before", "model", "steps/00-train/model"):
        atomic.write_text(folder / place / "model.json", "{}")
        atomic.write_text(folder / place / "model.safetensors", "")
    atomic.write_text(folder / "steps/01-train/checkpoint.pt", "")
    found.finish(RESULT)
    return found


def test_what_is_done_is_found_again(tmp_path: Path) -> None:
    written(tmp_path)
    again = Run(tmp_path, REQUEST)
    assert again.finished(0, "train") == RESULT
    assert again.finished(1, "train") is None
    assert again.before() == RESULT.after


def test_another_request_is_refused_and_named(tmp_path: Path) -> None:
    written(tmp_path)
    before = files(tmp_path)
    other = {"model": "resnet8", "recipe": {"steps": [{"rate": 0.5}], "seed": 1}}
    with pytest.raises(TersenetError) as caught:
        Run(tmp_path, other)
    assert "recipe.steps.0.rate is 0.4 there and 0.5 here; recipe.seed is 0 there and 1 here." in str(caught.value)
    assert "--out" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    for name in ("steps/01-mine/done.json", "model/model.json", "report.html"):
        atomic.write_text(tmp_path / name, "mine")
    before = files(tmp_path)
    with pytest.raises(TersenetError, match="holds no run"):
        Run(tmp_path, REQUEST, fresh=fresh)
    assert files(tmp_path) == before
    with pytest.raises(TersenetError, match="is a file"):
        Run(tmp_path / "report.html", REQUEST, fresh=fresh)


def test_fresh_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    written(tmp_path)
    for name in ("notes.txt", "steps/00-train/mine.txt", "steps/mine/done.txt", "model/README.md", "before.txt"):
        atomic.write_text(tmp_path / name, "mine")
    Run(tmp_path, {"model": "other"}, fresh=True)
    left = files(tmp_path)
    assert left.pop("run.json") == b'{\n  "model": "other"\n}\n'
    assert set(left) == {"notes.txt", "steps/00-train/mine.txt", "steps/mine/done.txt", "model/README.md", "before.txt"}
    assert not (tmp_path / "steps/01-train").exists()
    assert not (tmp_path / "before").exists()


def test_a_fresh_that_was_killed_half_way_is_finished_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "events.jsonl":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path, {"model": "other"}, fresh=True)
    assert (tmp_path / "steps/00-train/done.json").is_file()
    assert Run(tmp_path, {"model": "other"}).finished(0, "train") is None
    assert set(files(tmp_path)) == {"run.json"}


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    written(tmp_path)
    before = files(tmp_path)
    for name in (".report.json.7.tmp", "steps/01-train/.checkpoint.pt.7.tmp", "model/.model.safetensors.new.7.tmp"):
        atomic.write_text(tmp_path / name, "half")
    atomic.write_text(tmp_path / "model/.theirs.7.tmp", "")
    Run(tmp_path, REQUEST)
    assert files(tmp_path) == before | {"model/.theirs.7.tmp": b""}


def test_killed_while_the_very_first_file_was_written(tmp_path: Path) -> None:
    (tmp_path / ".run.json.7.tmp").write_text("{")
    Run(tmp_path, REQUEST)
    assert set(files(tmp_path)) == {"run.json"}


def test_a_request_without_any_result_may_change(tmp_path: Path) -> None:
    Run(tmp_path, REQUEST).write("recipe.yaml", "")
    Run(tmp_path, {"model": "other"})
    assert set(files(tmp_path)) == {"run.json"}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_damaged_files_are_named_with_the_way_out(tmp_path: Path, text: str) -> None:
    found = written(tmp_path)
    (tmp_path / "steps/00-train/done.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"done\.json is damaged.*--fresh"):
        found.finished(0, "train")
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"run\.json is damaged.*--fresh"):
        Run(tmp_path, REQUEST)
    assert Run(tmp_path, REQUEST, fresh=True).finished(0, "train") is None


def test_a_full_disk_while_an_event_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Run(tmp_path, REQUEST)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(TersenetError, match=r"events\.jsonl: No space left"):
        found.event({"event": "note"})


def test_what_the_first_rank_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(run.distributed, "world", lambda: 2)
    monkeypatch.setattr(run.distributed.dist, "broadcast_object_list", sent.append)

    def refuse() -> None:
        raise TersenetError("no")

    with pytest.raises(TersenetError, match=r"^no$"):
        run.on_first_rank(refuse)
    assert sent == [[None, "no"]]

    monkeypatch.setattr(run.distributed, "is_main", lambda: False)
    monkeypatch.setattr(run.distributed.dist, "broadcast_object_list", lambda values: values.__setitem__(1, "told"))
    with pytest.raises(TersenetError, match=r"^told$"):
        run.on_first_rank(refuse)


@pytest.mark.parametrize("half", [b'{"event": "epo', b"\xc3", b""])
def test_half_a_line_that_a_killed_process_left_is_taken_away(tmp_path: Path, half: bytes) -> None:
    written(tmp_path).event({"event": "epoch", "epoch": 1})
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    Run(tmp_path, REQUEST).event({"event": "done"})
    assert path.read_bytes() == whole + b'{"event": "done"}\n'
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["note", "epoch", "done"]
    path.write_bytes(b"{")
    Run(tmp_path, REQUEST)
    assert path.read_bytes() == b""
