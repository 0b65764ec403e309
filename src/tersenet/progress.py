"""What a step has done so far, part by part, so that an interrupted one goes on behind the last part that was whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersenet import atomic
from tersenet.errors import ArtifactError


class Progress:
    """Parts by name, one file each in `folder`; without a folder nothing is kept.

    Values are tensors, numbers, texts, and lists and dicts of them. All processes of a run see those of the first one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: dict[str, Any] | None = None
        self._count = 0

    def get(self, name: str) -> Any | None:
        """A part that was done before this process started, else None.

        Raises:
            ArtifactError: a damaged file.
        """
        if self._folder is None:
            return None
        if self._parts is None:
            from tersenet.train.distributed import from_first

            self._parts = from_first(self._read)
            self._count = len(self._parts)
        return self._parts.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a part that is done."""
        from tersenet.train.distributed import is_main

        if self._folder is None:
            return
        self.get(name)
        if is_main():
            import torch

            with atomic.replace(self._folder / f"{self._count:05d}.pt") as path:
                torch.save((name, value), path)
        self._count += 1

    def _read(self) -> dict[str, Any]:
        import pickle

        import torch

        parts: dict[str, Any] = {}
        assert self._folder is not None
        for path in sorted(self._folder.glob("*.pt")):
            try:
                name, value = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, ValueError, EOFError, TypeError, pickle.UnpicklingError) as error:
                raise ArtifactError(f"{path} is damaged ({error}); start again with --fresh") from error
            parts[name] = value
        return parts
