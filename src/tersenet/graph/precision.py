"""Full float32 arithmetic for comparisons: TF32 and bfloat16 shortcuts round away what is to be compared."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

# torch makes these attributes at run time; type checkers don't see them.
_SWITCHES = (
    (torch.backends.cudnn, "conv"),
    (torch.backends.cudnn, "rnn"),
    (torch.backends.cuda, "matmul"),
    (torch.backends.mkldnn, "conv"),
    (torch.backends.mkldnn, "matmul"),
)


@contextmanager
def full_float32() -> Generator[None]:
    """No TF32 (CUDA convolutions have it on by default) and no bfloat16 inside; afterwards all is as it was."""
    places = [getattr(backend, operators) for backend, operators in _SWITCHES]
    before = [place.fp32_precision for place in places]
    older = _older_switches()
    try:
        if older is not None:
            _set_older_switches(False, "highest")
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            _set_older_switches(*older)
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _older_switches() -> tuple[bool, str] | None:
    """The same switches under their older names, which must agree; None where torch refuses to tell, because only the
    newer ones were set."""
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_older_switches(allow_tf32: bool, matmul: str) -> None:
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.set_float32_matmul_precision(matmul)
