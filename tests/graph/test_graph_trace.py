from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.graph.trace import evaluating, trace

X = (torch.zeros(2, 3, 8, 8),)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.conv(x), 1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > 0:
            return y
        return -y


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, bias=False)
        self.b = nn.Conv2d(3, 3, 3, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(open(__file__), 1) if text in line and "line_of" not in line)


def test_a_branch_on_data_is_followed() -> None:
    """The network is really run, so Python may look at values; the trace is of the branch that was taken."""
    torch.manual_seed(0)
    model = Branching()
    seen = {trace(model, (x,)).ops[-1].name for x in torch.randn(20, 1, 3, 8, 8)}
    assert seen >= {"neg"}


def test_an_error_in_forward_is_told_with_its_line() -> None:
    with pytest.raises(GraphError) as error:
        trace(Branching(), (torch.zeros(2, 3, 2, 2),))
    assert "Branching can't be traced" in str(error.value)
    assert f"test_graph_trace.py:{line_of('y = self.conv(x)')}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_input_is_refused_with_its_shape() -> None:
    with pytest.raises(GraphError, match=r"\(2, 5, 8, 8\).*check it"):
        trace(Inner(), (torch.zeros(2, 5, 8, 8),))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(GraphError):
            trace(model, (torch.zeros(2, 9, 8, 8),))
    else:
        trace(model, X)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / sum(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, False]


def test_tensors_have_the_name_of_their_first_owner() -> None:
    seen = trace(Shared(), X)
    assert seen.parameters == {"a.weight", "scale"}
    assert len(seen.inputs) == 1


def test_operators_know_their_module_and_line() -> None:
    seen = trace(nn.Sequential(Inner()), X)
    (op,) = [op for op in seen.ops if "softmax" in op.name]
    assert op.place.module == "0"
    assert str(op.place) == f"test_graph_trace.py:{line_of('return torch.softmax')}"
    (layer,) = [op for op in seen.ops if op.name == "convolution"]
    assert layer.place.module == "0.conv"
    assert str(layer.place) == str(op.place), "the user's line, not torch's"


def test_index_tables_are_kept_with_their_content() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor([2, 0, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.order + 0]

    seen = trace(Table(), X)
    contents = [slot.content.tolist() for slot in seen.slots if slot.content is not None and not slot.floating]
    assert contents.count([2, 0, 1]) == 2


class Remembering(nn.Module):
    """Keeps what it made of a parameter for the next pass, as networks with tables of attention biases do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.rand(8))
        self.head = nn.Conv2d(8, 2, 1)
        self.known: dict[str, Tensor] = {}
        self.passes: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(len(self.passes))
        if "scale" not in self.known:
            self.known["scale"] = self.scale.exp()
        self.last = self.conv(x) * self.known["scale"].view(1, -1, 1, 1)
        return self.head(self.last)


def test_what_a_network_keeps_for_later_passes_is_made_anew_in_each() -> None:
    model = Remembering()
    graph = ModelGraph(model, (torch.randn(2, 3, 4, 4),))
    names = [op.name for op in graph.trace.ops]
    assert [op.name for op in trace(model, graph.example).ops] == names
    assert "exp" in names
    compact(graph, {"conv": np.arange(5)})
    assert model.scale.shape == (5,)
    assert (model.known, model.passes, model.last) == ({}, [], None)
