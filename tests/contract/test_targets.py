"""A target is met, and used up, on networks of different families."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch

from graph_support import DenseNet, MobileNetV2
from tersenet.errors import TersenetError
from tersenet.graph.budget import Ranking, Rounding, kept_at, kept_within, rank_globally, rank_locally
from tersenet.graph.model import ModelGraph
from tersenet.recipe_target import Target

NETWORKS = {**tiny.NETWORKS, "mobilenet": MobileNetV2, "densenet": DenseNet}


@pytest.mark.parametrize("rank", [rank_locally, rank_globally])
@pytest.mark.parametrize("rounding", [Rounding(), Rounding(multiple=2, at_least=3)])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_budget_is_kept_and_used_up(network: str, rounding: Rounding, rank: Callable[..., Ranking]) -> None:
    """It is used to 99.9 %, or no group has another channel (or multiple of them) that would fit."""
    shapes = [(3, 8, 8), (1, 8, 8)][: 2 if network == "two_inputs" else 1]
    graph = ModelGraph(NETWORKS[network](), tuple(torch.zeros(1, *shape) for shape in shapes))
    random = np.random.default_rng(0)
    ranking = rank({g.name: random.random(g.size) for g in graph.groups if g.frozen is None})
    for kind, count in (("macs", graph.macs), ("params", graph.params)):
        for percent in (80, 50, 1):
            target = Target.parse(f"{kind}={percent}%")
            if count(kept_at(ranking, 1.0, rounding)) > target.limit(count()):
                with pytest.raises(TersenetError, match="can't be met: with the selected layers at their smallest"):
                    kept_within(graph, ranking, target, count(), rounding, {})
                continue
            kept = kept_within(graph, ranking, target, count(), rounding, {})
            assert count(kept) <= target.limit(count())
            if count(kept) >= 0.999 * target.limit(count()):
                continue
            for name, places in kept.items():
                size = len(ranking[name])
                more = {name: np.arange(rounding.left(size, len(places) + 1))}
                assert len(places) == size or count(kept | more) > target.limit(count())
