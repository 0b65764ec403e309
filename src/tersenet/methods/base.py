"""What a compression method is: frozen settings, and what they do to a channel graph.

A method is one file in this folder. Defining the class registers it under its `method:` name; the recipe schema, the
command line's help and the contract tests find it there. Method files import torch inside functions only, so that
recipes can be read and checked without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from tersenet.errors import TersenetError
from tersenet.progress import Progress
from tersenet.recipe_target import Target
from tersenet.train.hooks import Hooks
from tersenet.train.settings import Fit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tersenet.data.bundle import Data
    from tersenet.graph.model import ModelGraph
    from tersenet.results import Accuracy, Equality, GroupMap, LayerFit

METHODS: dict[str, type[Method]] = {}


@dataclass
class Context:
    """What a method may use beside the graph. `notes`, `fits`, `maps`, `equality` and `masked` go into the step's part
    of the report.

    `original_macs` and `original_params` are what a relative target refers to.
    """

    device: torch.device
    seed: int
    target: Target | None = None
    original_macs: int = 0
    original_params: int = 0
    data: Data | None = None
    evaluate: Callable[[], Accuracy | None] = lambda: None
    """Accuracy of the network as it is now, on the test split, if there is one. For the report: it chooses nothing."""
    original: Callable[[], nn.Module | None] = lambda: None
    """The network before the first compressing step; None where this is it, or where a step has trained since."""
    progress: Progress = field(default_factory=Progress)
    """Where a method that takes long keeps what it has done, so that it goes on there when it was interrupted."""
    notes: list[str] = field(default_factory=list[str])
    fits: list[LayerFit] = field(default_factory=list["LayerFit"])
    maps: list[GroupMap] = field(default_factory=list["GroupMap"])
    equality: Equality | None = None
    masked: Accuracy | None = None

    def target_for(self, own: str | None) -> Target | None:
        """A step's own budget, or else the recipe's."""
        return Target.parse(own) if own else self.target


class Method(BaseModel):
    """Base of all methods. One that doesn't train does everything in `apply`.

    Only `graph.apply(edit)` changes a network's structure.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("method")
        if name is None:
            return
        other = METHODS.get(name)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TersenetError(f"two methods are called {name!r}: {other.__module__} and {cls.__module__}")
        METHODS[name] = cls

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Decide, and check that what was asked for can be done. Raises before anything is changed."""

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """The structural change without training, for a dry run."""
        self.apply(graph, context)


class TrainingMethod(Method):
    """Base of methods that train: `apply` checks, and swaps what has to be trained; then comes a fit with `hooks`, then
    `finish`."""

    fit: Fit
    """The training."""

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """The structural change without training, for a dry run; none by default."""

    def hooks(self, graph: ModelGraph, context: Context) -> Hooks:
        """What happens during training."""
        return Hooks()

    def finish(self, graph: ModelGraph, context: Context, hooks: Hooks) -> None:
        """After training: what `hooks` decided becomes edits."""


def all_methods() -> dict[str, type[Method]]:
    """Every registered method by name: the files of this folder, and the entry points `tersenet.methods` of others."""
    package = importlib.import_module("tersenet.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"tersenet.methods.{module.name}")
    for entry in entry_points(group="tersenet.methods"):
        entry.load()
    return dict(sorted(METHODS.items()))
