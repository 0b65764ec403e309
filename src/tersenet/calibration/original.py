"""The network before the first of several steps, as what layers are fitted to in a later one.

Layers have other names by then, and fewer outputs. Both follow from the edits that were made in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tersenet.calibration.readers import Reader, find_readers
from tersenet.graph.edits import Adapt, Edit, Fold, Keep, Merge, Resize, Split
from tersenet.graph.labels import IntArray
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import record_of

if TYPE_CHECKING:
    from tersenet.methods.base import Context


@dataclass
class Followed:
    """Where layers went. `origin`: a layer's name now -> its name then, None for one that gives nothing that was there;
    layers that are not in it kept their names. `kept`: its name now -> which of its outputs are left."""

    origin: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    kept: dict[str, IntArray] = field(default_factory=dict[str, IntArray])
    lost: bool = False

    def take(self, edit: Edit) -> None:
        if isinstance(edit, Keep):
            for part in edit.slices:
                for name in part.tensors if part.axis == 0 else ():
                    layer, _, parameter = name.rpartition(".")
                    if parameter == "weight":
                        places = np.asarray(part.keep, dtype=np.int64)
                        self.kept[layer] = self.kept[layer][places] if layer in self.kept else places
        elif isinstance(edit, Adapt):
            self._rename(edit.module, f"{edit.module}.inner")
        elif isinstance(edit, Split):
            self._rename(edit.module, f"{edit.module}.1")
            self.origin[f"{edit.module}.0"] = None
        elif isinstance(edit, Merge):
            self._rename(edit.second, edit.first)
        elif not isinstance(edit, (Fold, Resize)):
            # Other layers, and channels in another order: outputs are not what they were.
            self.lost = True

    def _rename(self, old: str, new: str) -> None:
        self.origin[new] = self.origin.get(old, old)
        self.origin[old] = None
        self.kept.pop(new, None)
        if old in self.kept:
            self.kept[new] = self.kept.pop(old)


class Original:
    """`graph` of the network as it was, and which of its layers gave what a layer gives now."""

    def __init__(self, graph: ModelGraph, edits: Sequence[Edit]) -> None:
        self.graph = graph
        self._readers = {reader.layer: reader for reader in find_readers(graph)[0]}
        self._followed = Followed()
        for edit in edits:
            self._followed.take(edit)

    @classmethod
    def of(cls, graph: ModelGraph, context: Context) -> Original | None:
        """None where this step is the first, or what came before it trained."""
        model = context.original()
        record = record_of(model) if model is not None else None
        if model is None or record is None:
            return None
        count = len(record.edits)
        if graph.record.edits[:count] != record.edits:
            return None
        return cls(ModelGraph(model.to(context.device).eval(), graph.example), graph.record.edits[count:])

    def counterpart(self, graph: ModelGraph, reader: Reader) -> tuple[Reader, Tensor | None] | None:
        """The layer that gave what a layer of `graph` gives now, and which of its outputs; None where there is none."""
        name = self._followed.origin.get(reader.layer, reader.layer)
        found = self._readers.get(name) if name is not None and not self._followed.lost else None
        if found is None or (found.sum is None) != (reader.sum is None):
            return None
        if _maps(self.graph, found) != _maps(graph, reader):
            return None
        kept = self._followed.kept.get(reader.layer)
        made = len(graph.model.get_parameter(f"{reader.layer}.weight"))
        if made != (len(self.graph.model.get_parameter(f"{name}.weight")) if kept is None else len(kept)):
            return None
        return found, None if kept is None else torch.from_numpy(kept)


def _maps(graph: ModelGraph, reader: Reader) -> list[tuple[int, ...]]:
    """What each of its uses makes, without the channels; of a linear layer the rows."""
    shapes = [graph.trace.slots[graph.trace.ops[use].result.slot].shape for use in reader.uses]
    return [tuple(shape[:1]) if len(shape) == 2 else tuple(shape[2:]) for shape in shapes]
