"""Something that a layer does differently while a network is recorded or exported."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Switch:
    """Off, but inside of `on`, and there for the thread alone that went in: another one may run the same network."""

    def __init__(self, name: str) -> None:
        self._state = ContextVar(name, default=False)

    def is_on(self) -> bool:
        """Never where torch.compile reads the code: it knows no such variables."""
        return not torch.compiler.is_dynamo_compiling() and self._state.get()

    @contextmanager
    def on(self) -> Generator[None]:
        token = self._state.set(True)
        try:
            yield
        finally:
            self._state.reset(token)
