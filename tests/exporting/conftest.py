from __future__ import annotations

import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A folder on a real disk of its own, of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mounted, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no disk of a known size can be mounted: {error}")
    if done.returncode != 0:
        pytest.skip(f"no disk of a known size can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
