"""Structured sparsification by hand: settings, hooks, and groupings as no training would make them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sfp_support import SHAPE, context
from torch import nn

from graph_support import randomise
from tersenet.graph.grouping import Groupable, Grouping, groupable
from tersenet.graph.model import ModelGraph
from tersenet.group_learning.hooks import GroupLearning
from tersenet.methods.structured_sparsification import StructuredSparsification
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.ops.channel_order import Order
from tersenet.recipe_target import Target


def settings(**changes: Any) -> StructuredSparsification:
    fit = {"epochs": 4, "lr": 0.05, "weight_decay": 0.0, "nesterov": False} | changes.pop("fit", {})
    return StructuredSparsification(**({"fit": fit, "sparsity": 0.4, "warmup": 1, "strength": 1e-3} | changes))


def hooks_on(
    model: nn.Module, method: StructuredSparsification, target: str | None = None, shape: tuple[int, ...] = SHAPE
) -> GroupLearning:
    graph = ModelGraph(model, (torch.zeros(2, *shape, dtype=next(model.parameters()).dtype),))
    wanted = Target.parse(target) if target else None
    return method.hooks(graph, context(target=wanted, original_macs=graph.macs(), original_params=graph.params()))


def graph_of(model: nn.Module, size: int = 16, dtype: torch.dtype = torch.float64) -> ModelGraph:
    """Of a randomised network in evaluation mode."""
    return ModelGraph(randomise(model).to(dtype), (torch.zeros(2, 3, size, size, dtype=dtype),))


def layers_of(graph: ModelGraph) -> list[Groupable]:
    return groupable(graph, ("*",), None)[0]


def random_grouping(layer: Groupable, groups: int, seed: int = 0) -> Grouping:
    random = np.random.default_rng(seed)
    return Grouping(groups, Order(random.permutation(layer.C_out), random.permutation(layer.C_in)))


def gathers(model: nn.Module) -> int:
    """How many index tables a network's grouped convolutions have."""
    found = [m for m in model.modules() if isinstance(m, GroupShuffleConv2d)]
    return sum(table is not None for module in found for table in (module.gather, module.scatter))
