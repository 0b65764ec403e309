"""Random networks: compact equals masked, or the graph says why it will not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph.random_networks import RandomNetwork
from graph_support import DeadOutput, check_exact
from tersenet.errors import GraphError
from tersenet.graph.compact import Constants
from tersenet.graph.labels import Residual

OUTPUT = "the network's output"


def check_networks(networks: int) -> None:
    """Nothing different, no other exception; hardly any refused; hardly any channel frozen."""
    refused: list[str] = []
    dead: list[int] = []
    shares: list[float] = []

    @settings(
        max_examples=networks, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        seed=st.integers(0, 2**31),
        depth=st.integers(1, 4),
        inputs=st.sampled_from((1, 1, 1, 2)),
        rate=st.sampled_from((0.2, 0.4, 0.5, 0.7)),
        residual=st.sampled_from(("coupled", "coupled", "independent")),
        constants=st.sampled_from(("auto", "zero")),
    )
    def check(seed: int, depth: int, inputs: int, rate: float, residual: Residual, constants: Constants) -> None:
        model, example = RandomNetwork(seed, depth, inputs), (torch.zeros(2, 3, 6, 6),) * inputs
        try:
            graph, _ = check_exact(model, example, residual, rate, constants, seed=seed % 1000)
        except GraphError as error:
            refused.append(str(error))
            return
        except DeadOutput:  # So little was left that every activation function is at zero.
            dead.append(seed)
            return
        if residual == "independent":  # The trunks keep their width there.
            return
        inner = [group for group in graph.groups if group.frozen != OUTPUT]
        shares.append(sum(g.size for g in inner if g.frozen is None) / max(1, sum(g.size for g in inner)))

    check()
    assert len(refused) <= 0.05 * networks, refused
    assert len(dead) <= 0.02 * networks
    assert len(shares) >= networks / 3
    assert sum(shares) >= 0.95 * len(shares), sum(shares) / len(shares)


def test_some_random_networks_are_compacted_exactly() -> None:
    check_networks(25)


@pytest.mark.slow
def test_many_random_networks_are_compacted_exactly() -> None:
    check_networks(500)
