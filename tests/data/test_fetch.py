from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_support import shrink_cifar, write_cifar
from tersenet.data import cifar, fetch
from tersenet.data.cifar_layout import LAYOUTS
from tersenet.errors import TersenetError, UnknownNameError


class Site:
    """A web site on 127.0.0.1 with one file. `cut`: the connection breaks off after so many bytes."""

    def __init__(self) -> None:
        self.content = b""
        self.cut: int | None = None
        self.requests = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests += 1
                if self.path != "/archive.tar.gz":
                    self.send_error(404, "Not Found")
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(site.content)))
                self.end_headers()
                self.wfile.write(site.content[: site.cut])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/archive.tar.gz"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Serves a tiny CIFAR-10, and `fetch` gets it from there."""
    shrink_cifar(monkeypatch)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    own = write_cifar(tmp_path / "origin")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(own, own.name)
    site.content = packed.getvalue()
    point_to(monkeypatch, site.url, site.content)
    yield site
    site.server.shutdown()
    site.server.server_close()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    archive = replace(fetch.ARCHIVES["cifar10"], url=url, md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(fetch.ARCHIVES, "cifar10", archive)


def test_the_published_addresses_and_checksums() -> None:
    assert {(a.url, a.md5) for a in fetch.ARCHIVES.values()} == {
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    }


def test_what_is_fetched_can_be_read(site: Site, tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    folder = fetch.fetch("cifar10", tmp_path / "new" / "data", lambda done, total: steps.append((done, total)))
    assert folder == tmp_path / "new" / "data" / "cifar-10-batches-bin"
    assert steps[-1] == (len(site.content), len(site.content))
    assert len(cifar.read("cifar10", folder.parent)[0]) == 50
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert fetch.fetch("cifar10", folder.parent) == folder
    assert site.requests == 1


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


def test_a_wrong_checksum(site: Site, tmp_path: Path) -> None:
    site.content = site.content[:-1] + b"?"
    with pytest.raises(TersenetError, match=r"the checksum .*, not .*cifar10:") as caught:
        fetch.fetch("cifar10", tmp_path / "data")
    assert fetch.ARCHIVES["cifar10"].md5 in str(caught.value)
    assert nothing_left(tmp_path / "data")


def test_a_connection_that_breaks_off(site: Site, tmp_path: Path) -> None:
    site.cut = 1000
    with pytest.raises(TersenetError, match="broke"):
        fetch.fetch("cifar10", tmp_path / "data")
    assert nothing_left(tmp_path / "data")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        point_to(monkeypatch, f"http://127.0.0.1:{port}/cifar-10-binary.tar.gz", b"")
        with pytest.raises(TersenetError, match="there is no network here") as caught:
            fetch.fetch("cifar10", tmp_path / "data")
    for word in (f"127.0.0.1:{port}", f"put cifar-10-binary.tar.gz into {tmp_path / 'data'}", "use cifar10:"):
        assert word in str(caught.value)
    assert nothing_left(tmp_path / "data")


def test_a_page_that_is_gone(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, site.url + ".old", b"")
    with pytest.raises(TersenetError, match="answered 404 Not Found"):
        fetch.fetch("cifar10", tmp_path / "data")


def test_a_member_outside_the_folder_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
    site.content = packed.getvalue()
    point_to(monkeypatch, site.url, site.content)
    with pytest.raises(TersenetError, match="can't be extracted"):
        fetch.fetch("cifar10", tmp_path / "data")
    assert nothing_left(tmp_path / "data")
    assert not list(tmp_path.rglob("escaped"))


def test_a_broken_set_is_not_overwritten(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "data" / LAYOUTS["cifar10"][0].folder
    target.mkdir(parents=True)
    (target / "test_batch.bin").write_bytes(b"mine")
    with pytest.raises(TersenetError, match="there but not whole"):
        fetch.fetch("cifar10", tmp_path / "data")
    assert (target / "test_batch.bin").read_bytes() == b"mine"
    assert site.requests == 0


def test_a_folder_that_can_not_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TersenetError, match="could not write to"):
        fetch.fetch("cifar10", tmp_path / "file")


def test_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        fetch.fetch("cifar-10", "anywhere")
