"""A network's structure put back as it was: so that a change can be tried on the network itself, without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


def structure_of(model: nn.Module) -> Callable[[], None]:
    """A function that gives every module the attributes, tensors and children that it has now, the very same objects.

    What is written into tensors in place, or into lists and dicts of the module's own, is not undone.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]] = []
    for module in model.modules():
        own = module.__dict__
        # A scripted module has other tables; no edit reaches into it.
        saved.append((own, dict(own), {name: dict(own[name]) for name in _TABLES if isinstance(own.get(name), dict)}))

    def restore() -> None:
        for own, attributes, tables in saved:
            # In place: dicts of a module may be held by others.
            for name, table in tables.items():
                attributes[name].clear()
                attributes[name].update(table)
            own.clear()
            own.update(attributes)

    return restore
