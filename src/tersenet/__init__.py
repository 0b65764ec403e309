"""tersenet: make a PyTorch CNN smaller and measurably faster, with its accuracy known.

Names are imported when they are first used, so that `import tersenet` does not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersenet.api import (
        Result,
        compress,
        evaluate,
        export,
        latency_table,
        load,
        measure,
        save,
        workload,
    )
    from tersenet.api_search import search_rates, sensitivity
    from tersenet.errors import ArtifactError, GraphError, TersenetError
    from tersenet.graph.model import ModelGraph
    from tersenet.lowering.lower import lower
    from tersenet.recipe import Recipe

_HOMES = {
    **dict.fromkeys(
        (
            "Result",
            "compress",
            "evaluate",
            "export",
            "latency_table",
            "load",
            "measure",
            "save",
            "workload",
        ),
        "tersenet.api",
    ),
    **dict.fromkeys(("search_rates", "sensitivity"), "tersenet.api_search"),
    **dict.fromkeys(("ArtifactError", "GraphError", "TersenetError"), "tersenet.errors"),
    "ModelGraph": "tersenet.graph.model",
    "lower": "tersenet.lowering.lower",
    "Recipe": "tersenet.recipe",
}

__all__ = [
    "ArtifactError",
    "GraphError",
    "ModelGraph",
    "Recipe",
    "Result",
    "TersenetError",
    "compress",
    "evaluate",
    "export",
    "latency_table",
    "load",
    "lower",
    "measure",
    "save",
    "search_rates",
    "sensitivity",
    "workload",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tersenet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
