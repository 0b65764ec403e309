"""Compiled kernels and measured times go to a folder of this test session; small networks are lowered in any case."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def always_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine measures: on small networks and busy machines anything may be the fastest."""
    monkeypatch.setattr("tersenet.lowering.lower.faster_than_lowered", lambda times: None)


@pytest.fixture(autouse=True)
def checked_anew(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test has proven does not hold in this one, which may have changed a kernel or a limit."""
    monkeypatch.setattr("tersenet.lowering.proven._own_code", lambda: request.node.nodeid)
