"""What every item costs the network's outputs for every number of units left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tersenet.calibration.allocation import Curves
from tersenet.calibration.choose import Choice, made_by
from tersenet.calibration.damage import damage_curve
from tersenet.calibration.items import Item
from tersenet.calibration.refit import curve
from tersenet.calibration.sampling import Statistics
from tersenet.calibration.solver import Solver

_BYTES = 1 << 30  # of second moments at once


def measured_curves(solver: Solver, items: Sequence[Item]) -> Curves:
    """For each item alone, the rest being whole: (size + 1,) damage to the outputs, never rising with the units left.

    The response error of the layers that read it is known for every number of units; `damage_curve` carries it over to
    the outputs. Damage is the squared difference of the outputs: of several items together it is about the sum, which a
    divergence of a trained network's confident softmax is not.
    """
    found = {item.name: curve.numpy() for item in items if (curve := solver.progress.get(_part(item))) is not None}
    items = [item for item in items if item.name not in found]
    for part in _within_memory(solver, items):
        readers = {reader.end: reader for item in part for reader in item.readers}
        known = solver.statistics(list(readers.values())) if readers else {}
        for item in part:
            solver.advance_probe([i for i in items if i.name not in found])
            measured = _curve(solver, item, known)
            solver.progress.put(_part(item), torch.from_numpy(measured))
            found[item.name] = measured
    return found


def _part(item: Item) -> str:
    return f"damage {item.name}"


def _curve(solver: Solver, item: Item, known: dict[int, Statistics]) -> NDArray[np.float64]:
    choice = solver.choice(item, known)
    errors = _errors(solver, item, known, choice)

    def damage_at(count: int) -> float:
        with solver.trial([item]):
            solver.remove(item, choice.kept(count))
            if solver.reconstruct:
                for reader in item.readers:
                    solver.fit(reader, known[reader.end])
            return solver.damage()

    return damage_curve(errors, damage_at)


def _errors(solver: Solver, item: Item, known: dict[int, Statistics], choice: Choice) -> NDArray[np.float64]:
    """Mean over the readers of the share of their responses that is missed; without one, of the filters' squares."""
    if not item.readers:
        squares = made_by(solver.graph, item)[choice.order].square()
        return np.concatenate([[1.0], 1 - (squares.cumsum(0) / squares.sum()).numpy()]).clip(0)
    curves = [curve(solver.graph, r, known[r.end], item.units, choice.order, solver.gone) for r in item.readers]
    return torch.stack(curves).mean(0).numpy()


def _within_memory(solver: Solver, items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items in parts whose moments fit into memory together; one part is one pass over the images."""
    part: list[Item] = []
    ends: dict[int, int] = {}
    for item in items:
        own = {r.end: _bytes(solver, r.layer) for r in item.readers}
        if part and sum((ends | own).values()) > _BYTES:
            yield part
            part, ends = [], {}
        part.append(item)
        ends |= own
    if part:
        yield part


def _bytes(solver: Solver, layer: str) -> int:
    return 8 * solver.graph.model.get_parameter(f"{layer}.weight")[0].numel() ** 2
