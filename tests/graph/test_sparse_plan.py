"""Which layers a network's own code keeps out of sparse Winograd convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.graph.model import ModelGraph
from tersenet.graph.sparse_plan import Mode, sparse_plan
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings

SETTINGS = WinogradReLUSettings()


class Boxes(nn.Module):
    """Finds nothing, as a detector does; and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.second(self.first(x.sub_(0.5)).relu())
        return made, made[:, :0]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


def test_a_relu_moves_where_an_output_is_empty() -> None:
    graph = ModelGraph(Boxes().eval(), (torch.randn(2, 3, 8, 8),))
    plan = sparse_plan(graph, "winograd_relu", "leave", SETTINGS, ["*"], [])
    assert plan.layers == ["second"]
    assert "no ReLU before it" in plan.left["first"]


@pytest.mark.parametrize(("mode", "layers"), [("spatial", ["first"]), ("native", ["first", "second", "third"])])
def test_a_weight_of_two_layers_gets_no_mask(mode: Mode, layers: list[str]) -> None:
    graph = ModelGraph(Tied().eval(), (torch.randn(2, 4, 8, 8),))
    plan = sparse_plan(graph, mode, "leave", SETTINGS, ["*"], [])
    assert plan.layers == layers
    if mode == "spatial":
        assert set(plan.left) == {"second", "third"}
        with pytest.raises(TersenetError, match="second, third: it shares its weight with another layer"):
            sparse_plan(graph, mode, "leave", SETTINGS, ["*"], ["first"])
