"""A network's convolutions split in two of lower rank one after another, in the order in which they run.

Each pair is fitted to what the original network gives, from what the network as it is gives it to read. While that is
done the network keeps its shape: it holds the one weight that a pair stands for. The layers are put in at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersenet.calibration.allocation import Curves
from tersenet.calibration.damage import damage_curve
from tersenet.calibration.images import Images
from tersenet.calibration.low_rank_fit import FORMS, Channel, Pair, Spatial, install, relu_follows
from tersenet.calibration.low_rank_layers import Splittable
from tersenet.calibration.original import Original
from tersenet.calibration.readers import Reader, find_readers
from tersenet.calibration.sampling import Targets, rows
from tersenet.calibration.solver import Solver
from tersenet.errors import GraphError
from tersenet.graph.copies import copied
from tersenet.graph.edits import Split
from tersenet.graph.model import ModelGraph
from tersenet.graph.proof import compare
from tersenet.nn.low_rank import Form, write
from tersenet.ops.gram import Moments
from tersenet.progress import Progress
from tersenet.results import Equality, LayerFit
from tersenet.train import distributed

_BYTES = 1 << 30  # of second moments at once
_TOLERANCE = 1e-4
"""Of the largest output, in float32: the weights of a pair are multiplied in another order than the one weight's."""


@dataclass
class Splitter:
    """`graph` has the network that is worked on. As it is when this is made, it says what is wanted."""

    graph: ModelGraph
    form: Form
    images: Images
    relu: bool
    progress: Progress = field(default_factory=Progress)
    original: Original | None = None
    solver: Solver = field(init=False)
    fits: list[LayerFit] = field(default_factory=list[LayerFit])
    weights: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict[str, tuple[int, Tensor, Tensor]])
    notes: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.solver = Solver(self.graph, self.images, "lasso", reconstruct=True, progress=self.progress)

    def curves(self, layers: Sequence[Splittable], kind: Literal["measured", "energy"]) -> Curves:
        """For each layer alone: (size + 1,) damage at every rank, 0 for the whole layer.

        `energy`: the logarithm of the share of the responses' variance that a rank explains, so that the product over
        layers is what is kept high. `measured`: what the rank does to the network's outputs, by trials of a few ranks
        and the response error (`damage_curve`).

        Source: Zhang et al. 2016, section 3.4 (the product of the responses' energies).
        """
        known = self.progress.get("curves")
        if known is not None:
            return {name: curve.numpy() for name, curve in known.items()}
        found: Curves = {}
        for part in _within_memory(self.form, layers):
            for splitting, moments in self._moments(part):
                self.solver.advance_probe([], [later.reader for later in layers[len(found) :]])
                found[splitting.layer.name] = self._curve(splitting, moments, kind)
        self.progress.put("curves", {name: torch.from_numpy(curve) for name, curve in found.items()})
        return found

    def _curve(
        self, splitting: Spatial | Channel, moments: Moments, kind: Literal["measured", "energy"]
    ) -> NDArray[np.float64]:
        errors = torch.cat([splitting.errors(moments), torch.zeros(1, dtype=torch.float64)]).numpy()
        if kind == "energy":
            return -np.log((1 - errors).clip(1e-6))
        return damage_curve(errors, lambda rank: self._damage(splitting, moments, rank))

    def run(self, layers: Sequence[Splittable], ranks: Mapping[str, int]) -> None:
        """Fit a pair of the given rank for every layer below its `size`, and the other layers behind the first one as
        far as there are rows enough."""
        wanted = {layer.name: layer for layer in layers if ranks[layer.name] < layer.size}
        readers, _ = find_readers(self.graph)
        first = next((place for place, reader in enumerate(readers) if reader.layer in wanted), len(readers))
        fitted = [r for r in readers[first:] if r.layer in wanted or self.solver.determined(r)]
        if not fitted:
            return
        self.solver.use(Targets(self.graph, fitted, self.images, self.original))
        self.solver.start()
        for place, reader in enumerate(fitted):
            done = self.progress.get(f"split {place}")
            if done is None:
                self.solver.advance([], fitted[place:])
                fits, notes = len(self.fits), len(self.notes)
                if reader.layer in wanted:
                    self._split(wanted[reader.layer], ranks[reader.layer])
                else:
                    self._refit(reader)
                self.progress.put(f"split {place}", self._done(reader, fits, notes))
            else:
                self._restore(reader, done)

    def _done(self, reader: Reader, fits: int, notes: int) -> dict[str, Any]:
        """What one layer's fit has made, for an interrupted run."""
        return {
            "pair": list(self.weights[reader.layer]) if reader.layer in self.weights else None,
            "tensors": [t.detach().clone() for t in self.solver.tensors(reader)],
            "fits": [fit.model_dump() for fit in self.fits[fits:]],
            "notes": self.notes[notes:],
        }

    def _restore(self, reader: Reader, done: dict[str, Any]) -> None:
        if done["pair"] is not None:
            rank, first, second = done["pair"]
            self.weights[reader.layer] = rank, first, second
        with torch.no_grad():
            for tensor, value in zip(self.solver.tensors(reader), done["tensors"], strict=True):
                tensor.copy_(value)
        self.fits += [LayerFit.model_validate(fit) for fit in done["fits"]]
        self.notes += done["notes"]

    def carry_out(self) -> Equality:
        """Put the pairs in the layers' places.

        Raises:
            GraphError: the network with pairs would not equal the one that was worked on.
        """
        whole = copied(self.graph.model)
        for name, (rank, first, second) in self.weights.items():
            bias = dict(self.graph.model.get_submodule(name).named_parameters()).get("bias")
            self.graph.apply(Split(module=name, form=self.form, rank=rank))
            write(self.graph.model.get_submodule(f"{name}.0"), first, None)
            write(self.graph.model.get_submodule(f"{name}.1"), second, bias)
        equality = compare(whole, self.graph.model, self.graph.example)
        equality = equality.model_copy(update={"tolerance": max(equality.tolerance, _TOLERANCE)})
        if not equality.relative <= equality.tolerance:
            raise GraphError(
                f"the network of pairs differs by {equality.relative:.2g} of the largest output from the one that was "
                f"fitted (allowed {equality.tolerance:.0e}); leave layers out (exclude)"
            )
        return equality

    def _moments(self, layers: Sequence[Splittable]) -> list[tuple[Spatial | Channel, Moments]]:
        """One pass over the images for the highest ranks of all these layers. The network says what is wanted."""
        splittings = {layer.reader.end: FORMS[self.form](self.graph, layer) for layer in layers}
        found = {end: s.empty(s.layer.size - 1) for end, s in splittings.items()}
        readers = [layer.reader for layer in layers]
        for reader, x, y in rows(self.graph, None, readers, self.images, self.solver.gone):
            splitting = splittings[reader.end]
            splitting.add(found[reader.end], splitting.features(x, splitting.layer.size - 1), y)
        return [(splitting, found[end]) for end, splitting in splittings.items()]

    def _damage(self, splitting: Spatial | Channel, moments: Moments, rank: int) -> float:
        tensors = self.solver.tensors(splitting.reader)
        values = [t.detach().clone() for t in tensors]
        try:
            install(self.graph, splitting, splitting.linear(moments, rank), moments)
            return self.solver.damage()
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)

    def _split(self, layer: Splittable, rank: int) -> None:
        splitting = FORMS[self.form](self.graph, layer)
        behind_relu = self.relu and splitting.has_intercept and relu_follows(self.graph, layer.reader)
        moments = splitting.empty(rank)
        parts: list[tuple[Tensor, Tensor]] = []
        for x, y in self.solver.rows(layer.reader):
            features = splitting.features(x, rank)
            splitting.add(moments, features, y)
            if behind_relu:
                parts.append((features, y))
        before = splitting.data_free(moments, rank)
        pair = self._fitted(splitting, moments, parts, rank)
        first, second = install(self.graph, splitting, pair, moments)
        tensors = [first, second, *(t.detach() for t in self.solver.tensors(layer.reader))]
        distributed.broadcast(tensors)
        self.weights[layer.name] = rank, first, second
        entry = LayerFit(name=layer.name, what="rank", before=layer.size, after=rank)
        entry.unfitted, entry.error, entry.output_error = before**0.5, pair.error**0.5, self.solver.output_error()
        self.fits.append(entry)
        seen, width = moments.rows // (1 if splitting.has_intercept else 2), moments.inputs
        if seen <= width:
            self.notes.append(
                f"{layer.name!r}: {seen} calibration rows can't determine {width} weights per output; what they don't "
                f"determine stays as it was. At least {width + 1} rows are needed, and {4 * width} are better: use "
                "more images, or more positions each"
            )

    def _fitted(
        self, splitting: Spatial | Channel, moments: Moments, parts: list[tuple[Tensor, Tensor]], rank: int
    ) -> Pair:
        if not parts:
            return splitting.linear(moments, rank)
        x, y = (torch.cat(several) for several in zip(*parts, strict=True))
        parts.clear()
        return splitting.behind_relu(x, y, rank)

    def _refit(self, reader: Reader) -> None:
        error, notices = self.solver.fit(reader, self.solver.statistics([reader])[reader.end])
        inputs = int(self.solver.left_out(reader).size)
        entry = LayerFit(name=reader.layer, before=inputs, after=inputs)
        entry.error, entry.output_error = error**0.5, self.solver.output_error()
        self.fits.append(entry)
        self.notes += notices


def _within_memory(form: Form, layers: Sequence[Splittable]) -> Iterator[list[Splittable]]:
    """Layers in parts whose moments fit into memory together; one part is one pass over the images."""
    part: list[Splittable] = []
    size = 0
    for layer in layers:
        width = 3 * layer.size if form == "spatial" else layer.size
        if part and size + 8 * width**2 > _BYTES:
            yield part
            part, size = [], 0
        part.append(layer)
        size += 8 * width**2
    if part:
        yield part
