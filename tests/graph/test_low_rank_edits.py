"""The edits that split a convolution in two and merge two into one: replayed, and refused where they don't fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from graph_support import compare_on
from tersenet.errors import GraphError
from tersenet.graph.edits import Edit, Merge, Split
from tersenet.graph.merging import mergeable
from tersenet.graph.model import ModelGraph
from tersenet.nn.low_rank import write
from tersenet.ops.low_rank import spatial_decomposition

EDITS: TypeAdapter[Any] = TypeAdapter(Edit)


def network(**settings: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, **settings), nn.ReLU(), nn.Conv2d(8, 6, 1))


@pytest.mark.parametrize("edit", [Split(module="0", form="spatial", rank=3), Merge(first="0", second="2")])
def test_they_round_trip(edit: Split | Merge) -> None:
    assert EDITS.validate_json(edit.model_dump_json()) == edit


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (0, 2), "dilation": (2, 1), "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_a_spatial_pair_of_full_rank_is_the_layer(settings: dict[str, Any]) -> None:
    """With its stride, padding and dilation on the axis that each belongs to."""
    whole, model = network(**settings).eval(), network(**settings).eval()
    weight, bias = whole[0].weight.detach(), whole[0].bias
    with torch.no_grad():  # of rank 4, so that a pair has fewer weights
        weight.copy_(torch.einsum("rch,orw->ochw", torch.randn(4, 3, 3), torch.randn(8, 4, 3)))
    Split(module="0", form="spatial", rank=4).replay(model)
    first, second = spatial_decomposition(weight).pair(4)
    write(model[0][0], first, None)
    write(model[0][1], second, bias)
    assert isinstance(model[0], nn.Sequential)
    assert (model[0][1].bias is None) is (bias is None)
    assert compare_on(whole, model, (torch.randn(2, 3, 12, 11),)) < 1e-5


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_splitting_draws_no_random_numbers_and_keeps_modes(form: Any) -> None:
    model = network().eval().requires_grad_(False)
    state = torch.get_rng_state()
    Split(module="0", form=form, rank=3).replay(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert float(model[0][0].weight.abs().sum()) == 0.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Split(module="0", form="spatial", rank=10), "rank must be from 1 to 9, not 10"),
        (Split(module="0", form="channel", rank=8), "more weights than it"),
        (Split(module="1", form="channel", rank=2), "must be an nn.Conv2d"),
        (Split(module="9", form="channel", rank=2), "does not have"),
        (Merge(first="0", second="1"), "must be an nn.Conv2d"),
        (Merge(first="2", second="0"), "reads 3 channels"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Split | Merge, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        edit.replay(network())


def test_a_grouped_layer_is_not_split() -> None:
    with pytest.raises(GraphError, match="grouped"):
        Split(module="0", form="channel", rank=1).replay(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": 1.5}, {"form": "both"}, {"module": "a b"}])
def test_fields_out_of_a_file(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EDITS.validate_python({"kind": "split", "module": "0", "form": "spatial", "rank": 3} | fields)


class Chains(nn.Module):
    """Of four 1x1 layers behind others, the first alone can be merged and pays: then a norm, a second reader, and a
    dear one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 9, 1, bias=False)
        self.c, self.norm, self.d = nn.Conv2d(9, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.e, self.f = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.g, self.h = nn.Conv2d(8, 2, 3, bias=False), nn.Conv2d(2, 40, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.norm(self.c(self.b(self.a(x)))))
        y = self.e(x)
        return self.h(self.g(self.f(y) + y))


def test_fact_16_merging_keeps_the_outputs_and_is_done_where_it_pays() -> None:
    whole, model = Chains().eval(), Chains().eval()
    graph = ModelGraph(model, (torch.zeros(2, 3, 12, 12),))
    assert mergeable(graph) == [("a", "b")]
    graph.apply(Merge(first="a", second="b"))
    assert model.a.weight.shape == (9, 3, 3, 3)
    assert isinstance(model.b, nn.Identity)
    assert compare_on(whole, model, (torch.randn(2, 3, 12, 12),)) < 1e-5
    assert mergeable(graph) == []


def test_a_merge_that_costs_more_is_refused() -> None:
    model = Chains()
    with pytest.raises(GraphError, match="cost more"):
        Merge(first="g", second="h").replay(model)
