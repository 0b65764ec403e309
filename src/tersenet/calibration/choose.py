"""Which units of an item stay: by the LASSO over their contributions, or by the baselines that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tersenet.calibration.items import Item
from tersenet.calibration.readers import owners, units_read
from tersenet.calibration.refit import contribution
from tersenet.calibration.sampling import Statistics
from tersenet.graph.importance import filter_scores, unit_scores
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.ops.contributions import summed
from tersenet.ops.importance import FILTER_SCORES
from tersenet.ops.lasso_path import lasso_path

Selection = Literal["lasso", "max_response", "first", "random"]


class Choice(Protocol):
    """`order`: (size,) all units, those first that stay longest. `kept(k)`: k of them, ascending."""

    @property
    def order(self) -> Tensor: ...

    def kept(self, count: int) -> Tensor: ...


@dataclass(frozen=True)
class Ranked:
    """The same units first for every number of them."""

    order: Tensor

    def kept(self, count: int) -> Tensor:
        return self.order[:count].sort().values


def choose(
    graph: ModelGraph,
    item: Item,
    found: Mapping[int, Statistics],
    selection: Selection,
    gone: NDArrayBool,
    generator: torch.Generator,
) -> Choice:
    """The choice of an item's units. Where no layer that reads them can be fitted, by the filters that make them."""
    if selection == "first":
        return Ranked(torch.arange(item.size))
    if selection == "random":
        return Ranked(torch.randperm(item.size, generator=generator))
    if not item.readers:
        return Ranked(torch.argsort(made_by(graph, item), descending=True, stable=True))
    if selection == "max_response":
        return Ranked(torch.argsort(_responses(graph, item), descending=True, stable=True))
    return lasso_path(summed([contribution(graph, r, found[r.end], item.units, gone) for r in item.readers]))


def made_by(graph: ModelGraph, item: Item) -> Tensor:
    """(size,) L2 norm of the filters that make each unit."""
    assert item.group is not None
    return unit_scores(item.group, filter_scores(graph, [item.group], FILTER_SCORES["l2"])).double().cpu()


def _responses(graph: ModelGraph, item: Item) -> Tensor:
    """(size,) sum of the absolute weights that read each unit; every layer counts the same."""
    total = torch.zeros(item.size, dtype=torch.float64)
    for reader in item.readers:
        weight = graph.model.get_parameter(f"{reader.layer}.weight").detach().double().cpu().abs()
        sums = weight.view(reader.groups, -1, weight.shape[1], weight[0, 0].numel()).sum((1, 3)).flatten()
        owner = owners(units_read(graph, reader).reshape(-1), item.units)
        part = torch.zeros_like(total).index_add_(0, owner[owner >= 0], sums[owner >= 0])
        total += part / (float(part.sum()) or 1.0)
    return total
