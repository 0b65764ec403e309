"""Every error that a user can cause, as one clear message: the thing, its value, the rule and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TersenetError(Exception):
    """Something the user gave can't be used. The message is complete; the command line prints it without traceback."""


class UnknownNameError(TersenetError):
    """A name that is not in a table; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        near = nearest(name, known)
        offer = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
        super().__init__(f"unknown {kind} {name!r}{offer}" + (f" {hint}" if hint else ""))


class ArtifactError(TersenetError):
    """A saved file or folder that is damaged, forged or of another format."""


class NotFiniteError(TersenetError):
    """A network whose loss or metric is NaN or infinite, so that nothing can be said of it."""


class GraphError(TersenetError):
    """A network, layer or operator that the channel graph can't handle; nothing has been changed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` known names most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def first_line(error: Exception) -> str:
    """What goes into a message of one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
