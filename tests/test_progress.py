"""Parts of a step that are kept, and found by the next process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tersenet.errors import ArtifactError
from tersenet.progress import Progress
from tersenet.train import distributed


def test_parts_are_found_by_the_next_process(tmp_path: Path) -> None:
    first = Progress(tmp_path / "new")
    assert first.get("a") is None
    first.put("a", {"kept": torch.arange(3), "notes": ["x"]})
    first.put("b", 2)
    second = Progress(tmp_path / "new")
    part = second.get("a")
    assert part is not None
    assert part["kept"].tolist() == [0, 1, 2]
    second.put("c", 3)
    third = Progress(tmp_path / "new")
    assert [third.get(name) for name in ("b", "c", "d")] == [2, 3, None]
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]


def test_without_a_folder_nothing_is_kept() -> None:
    progress = Progress()
    progress.put("a", 1)
    assert progress.get("a") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"\x80\x04K\x01."])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    Progress(tmp_path).put("a", 1)
    next(tmp_path.glob("*.pt")).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"00000\.pt is damaged .*--fresh"):
        Progress(tmp_path).get("a")


def test_tensors_on_the_cpu_go_through_the_gpu_where_that_is_how_ranks_talk(monkeypatch: Any) -> None:
    sent: list[str] = []
    tensor = torch.zeros(2)

    def send(value: torch.Tensor, source: int) -> None:
        sent.append("copy" if value is not tensor else "tensor")
        value += 1

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed.dist, "broadcast", send)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    for backend, way in (("nccl", "copy"), ("gloo", "tensor")):
        monkeypatch.setattr(distributed.dist, "get_backend", lambda name=backend: name)
        sent.clear()
        distributed.broadcast([tensor])
        assert sent == [way]
    assert tensor.tolist() == [2, 2]
