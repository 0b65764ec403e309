"""The edits of grouped convolutions as they come out of a file: permutations that fit, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import nn

from tersenet.errors import GraphError
from tersenet.graph.edits import Axis, Budget, Edit, Group, Reorder

EDITS: TypeAdapter[Group | Reorder] = TypeAdapter(Edit)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))


@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
def test_an_order_round_trips(order: list[int]) -> None:
    edit = Group(module="3", groups=2, rows=tuple(order), columns=tuple(reversed(order)))
    assert EDITS.validate_json(edit.model_dump_json()) == edit


@pytest.mark.parametrize("order", ["", "1", "0,0", "0,2", "-1,0", "0,1,", "0,1\n", "٠,1", "0x0,1", "0;1", "1e0,0"])
def test_orders_that_are_refused(order: str) -> None:
    with pytest.raises(ValidationError, match="an order of channels must"):
        EDITS.validate_python({"kind": "group", "module": "3", "groups": 2, "rows": order, "columns": "0,1"})


@pytest.mark.parametrize("order", [[0.2, 1.1], ["1", "0"], [False, True], None])
def test_orders_that_are_no_integers(order: object) -> None:
    with pytest.raises(ValidationError, match="an order of channels must be of integers"):
        EDITS.validate_python({"kind": "group", "module": "3", "groups": 2, "rows": order, "columns": "0,1"})


def test_orders_count_towards_the_budget() -> None:
    edit = Group(module="3", groups=2, rows=tuple(range(10)), columns=tuple(range(10))).model_dump_json()
    with pytest.raises(ValidationError, match="more indices than any network has"):
        EDITS.validate_json(edit, context=Budget(left=15))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_group_edit_replays(device: str) -> None:
    with torch.device(device):
        model = network()
        Group(module="3", groups=2, rows=(3, 1, 0, 2), columns=(5, 4, 3, 2, 1, 0)).replay(model)
    made = model[3]
    assert made.weight.shape == (4, 3, 1, 1)
    assert made.weight.device.type == made.bias.device.type == device
    # Index tables are not in the state dict that fills the model, so they are real.
    assert made.gather.tolist() == [5, 4, 3, 2, 1, 0]
    assert made.scatter.tolist() == [2, 1, 3, 0]
    assert set(model.state_dict()) == set(network().state_dict())
    if device == "cpu":
        dense = network()[3]
        assert torch.equal(made.weight[0], dense.weight[3, [5, 4, 3]])
        assert torch.equal(made.weight[3], dense.weight[2, [2, 1, 0]])
        assert torch.equal(made.bias, dense.bias[[3, 1, 0, 2]])


def test_a_reorder_edit_replays() -> None:
    model, before = network(), network()
    x = torch.randn(2, 2, 5, 5)
    first = (
        Axis(tensors=("0.weight",), axis=0),
        *(Axis(tensors=(n,), axis=0) for n in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")),
    )
    order = (2, 0, 1, 5, 4, 3)
    Reorder(group="0", order=order, axes=(*first, Axis(tensors=("3.weight",), axis=1))).replay(model)
    assert torch.equal(model[0].weight, before[0].weight[list(order)])
    torch.testing.assert_close(model.eval()(x), before.eval()(x))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Group(module="3", groups=3, rows=(0, 1, 2, 3), columns=tuple(range(6))), "can't be split into 3 groups"),
        (Group(module="3", groups=2, rows=(0, 1), columns=tuple(range(6))), "orders 2 x 6 channels"),
        (Group(module="1", groups=2, rows=(0, 1), columns=(0, 1)), "must be an nn.Conv2d inside"),
        (Group(module="9", groups=2, rows=(0, 1), columns=(0, 1)), "does not have"),
        (Reorder(group="0", order=(1, 0), axes=(Axis(tensors=("3.weight",), axis=1),)), "orders 2 places of axis 1"),
        (Reorder(group="0", order=(1, 0), axes=(Axis(tensors=("3.weight",), axis=5),)), "orders 2 places of axis 5"),
        (Reorder(group="0", order=(1, 0), axes=(Axis(tensors=("3.gamma",), axis=0),)), "does not have"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit: Group | Reorder, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        edit.replay(network())


def test_a_grouped_layer_is_not_grouped_again() -> None:
    model = network()
    edit = Group(module="3", groups=2, rows=(3, 1, 0, 2), columns=(5, 4, 3, 2, 1, 0))
    edit.replay(model)
    with pytest.raises(GraphError, match=r"a GroupShuffleConv2d; it must be an nn\.Conv2d"):
        edit.replay(model)
