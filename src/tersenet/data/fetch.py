"""Downloading the archives that may be downloaded: checksum first, then extraction, all of it or nothing."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tersenet.data.cifar_layout import LAYOUTS, Layout, present
from tersenet.errors import TersenetError, UnknownNameError

TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    url: str
    md5: str
    layout: Layout


# Source: https://www.cs.toronto.edu/~kriz/cifar.html, with its checksums.
_SITE = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {
    name: Archive(_SITE + LAYOUTS[name][0].archive, md5, LAYOUTS[name][0])
    for name, md5 in (
        ("cifar10", "c32a1d4ab5d03f1284b67883e8d87530"),
        ("cifar100", "03b5dce01913d631647c71ecec9e9cb8"),
    )
}

Progress = Callable[[int, int | None], None]


def fetch(name: str, folder: str | Path, progress: Progress | None = None) -> Path:
    """Download a data set into `folder`, unless it is there, and return its own folder in it.

    Args:
        name: cifar10 or cifar100.
        folder: made if need be.
        progress: called with the bytes so far and the bytes in all (None if the server doesn't say).

    Raises:
        UnknownNameError: nothing by that name can be downloaded.
        TersenetError: no network, a wrong checksum, a full disk, or something else lies in the way. Nothing is left
            behind then.
    """
    if name not in ARCHIVES:
        raise UnknownNameError(
            "data set to fetch", name, ARCHIVES, f"There are {' and '.join(ARCHIVES)}; digits is embedded."
        )
    archive, root = ARCHIVES[name], Path(folder).expanduser()
    target = root / archive.layout.folder
    if present(target, archive.layout):
        return target
    if target.exists():
        raise TersenetError(f"{target} is there but not whole; move it away, and fetch again.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
            _download(name, archive, Path(temporary) / "archive", root, progress)
            _extract(Path(temporary) / "archive", Path(temporary), archive)
            os.replace(Path(temporary) / archive.layout.folder, target)
    except OSError as error:
        raise TersenetError(f"could not write to {root}: {error.strerror or error}. Nothing was left there.") from error
    return target


def _download(name: str, archive: Archive, path: Path, root: Path, progress: Progress | None) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        try:
            with urllib.request.urlopen(archive.url, timeout=TIMEOUT_SECONDS) as response:
                _copy(response, file, digest.update, progress)
        except urllib.error.HTTPError as error:
            raise TersenetError(
                f"{archive.url} answered {error.code} {error.reason}. {_by_hand(name, root)}"
            ) from error
        except urllib.error.URLError as error:
            host = urllib.parse.urlsplit(archive.url).netloc
            raise TersenetError(
                f"there is no network here, or {host} does not answer ({error.reason}). {_by_hand(name, root)}"
            ) from error
        except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
            raise TersenetError(
                f"{archive.url} broke off ({error!r}). Try again, or: {_by_hand(name, root)}"
            ) from error
    if digest.hexdigest() != archive.md5:
        raise TersenetError(
            f"{archive.url} gave a file with the checksum {digest.hexdigest()}, not {archive.md5}: broken off, or not "
            f"the original. It was deleted; try again, or: {_by_hand(name, root)}"
        )


def _by_hand(name: str, root: Path) -> str:
    url = ARCHIVES[name].url
    return f"Download {url} elsewhere, put {url.rpartition('/')[2]} into {root} and use {name}:{root}."


def _copy(response: IO[bytes], file: IO[bytes], update: Callable[[bytes], None], progress: Progress | None) -> None:
    length = getattr(response, "length", None)
    done = 0
    while chunk := response.read(_CHUNK):
        update(chunk)
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, length)


def _extract(path: Path, folder: Path, archive: Archive) -> None:
    """The filter refuses members that point out of the folder."""
    try:
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    except (EOFError, tarfile.TarError, zlib.error) as error:
        raise TersenetError(f"the archive from {archive.url} can't be extracted: {error}.") from error
    if not (folder / archive.layout.folder).is_dir():
        raise TersenetError(f"the archive from {archive.url} does not hold {archive.layout.folder}.")
