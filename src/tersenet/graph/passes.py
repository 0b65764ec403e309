"""What every pass of a network needs: evaluation mode, and the tensors among what it takes and gives."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tersenet.graph import lookup


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode inside; afterwards every module is in the mode that it had."""
    modes = {module: module.training for module in lookup.named_modules(model).values()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclass-like outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in children(value) for t in tensors_in(item)]


def children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())  # pyright: ignore
    if isinstance(value, (list, tuple)):
        return list(value)  # pyright: ignore
    return list(vars(value).values()) if hasattr(value, "__dataclass_fields__") else []
