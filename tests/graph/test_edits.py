"""Edits as they come out of a file: they shrink what is there, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import nn

from tersenet.errors import GraphError
from tersenet.graph.edits import Adapt, Attribute, Budget, Edit, Keep, Slice, format_indices, parse_indices
from tersenet.graph.record import InputSpec

EDITS: TypeAdapter[Keep | Adapt] = TypeAdapter(Edit)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))


def keep(*slices: Slice, attributes: tuple[Attribute, ...] = ()) -> Keep:
    return Keep(group="g", slices=slices, attributes=attributes)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_indices_round_trip(values: set[int]) -> None:
    indices = tuple(sorted(values))
    assert parse_indices(format_indices(indices)) == indices
    assert parse_indices(list(indices)) == indices


@pytest.mark.parametrize(
    "text", ["", "3-1", "1,1", "2,1", "-1", "1-", "0-3\n", "٣", "0x1", "1 ,2", "0-10000000", "0-4,3-9", "1" * 40]
)
def test_indices_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="indices"):
        parse_indices(text)


@pytest.mark.parametrize("values", [[-1], [1, 1], [2, 1]])
def test_numbers_that_are_no_indices(values: list[int]) -> None:
    with pytest.raises(ValueError, match="increasing"):
        parse_indices(values)


@pytest.mark.parametrize("values", [[0.5, 1.7], ["0", "1"], [True], [10**30], {"0": 1}, [[0], [1, 2]], None])
def test_what_is_no_list_of_integers(values: Any) -> None:
    """Nothing is rounded: 0.5 and 1.7 are not 0 and 1."""
    with pytest.raises(ValueError, match="indices must be integers"):
        parse_indices(values)


def test_a_short_text_can_not_stand_for_endless_indices() -> None:
    """Refused before the numbers are made: the second range goes back to the start of the first."""
    with pytest.raises(ValueError, match="out of order"):
        parse_indices(",".join(["0-999999"] * 10_000))
    with pytest.raises(ValueError, match="more indices"):
        parse_indices(list(range(11)), Budget(left=10))
    edit = '{"kind": "adapt", "module": "0", "scatter": "0-9", "width": 40}'
    budget = Budget(left=120)
    for _ in range(2):
        EDITS.validate_json(edit, context=budget)
    with pytest.raises(ValidationError, match="more indices than any network has"):
        EDITS.validate_json(edit, context=budget)


@pytest.mark.parametrize(
    "name", ["training", "__class__", "__dict__", "_version", "_modules", "stride", "padding", "in_channels\n", ""]
)
def test_attributes_that_no_edit_may_set(name: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        Attribute(module="0", name=name, value=1)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("out_channels", 7), ("in_features", 1), ("num_features", 2), ("forward", 1), ("weight", 1), ("bias", (1,))],
    ids=["larger", "not", "bn", "method", "tensor", "list"],
)
def test_attributes_only_shrink(attribute: str, value: int) -> None:
    edit = keep(attributes=(Attribute(module="0", name=attribute, value=value),))
    with pytest.raises(GraphError, match="only shrinks"):
        edit.replay(network())


@pytest.mark.parametrize(
    ("tensor", "axis", "indices"),
    [
        ("0.weight", 0, (0, 6)),
        ("0.weight", 0, (9_999_999,)),
        ("0.weight", 4, (0,)),
        ("0.nothing", 0, (0,)),
        ("0.forward", 0, (0,)),
        ("0", 0, (0,)),
        ("", 0, (0,)),
        ("9.weight", 0, (0,)),
        ("..", 0, (0,)),
        ("0.__class__", 0, (0,)),
    ],
)
def test_slices_that_do_not_fit(tensor: str, axis: int, indices: tuple[int, ...]) -> None:
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GraphError, match="edit"):
        keep(Slice(tensors=(tensor,), axis=axis, keep=indices)).replay(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["a/b", "a b", "a\n", "x" * 513, "ä"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(ValidationError):
        Slice(tensors=(name,), axis=0, keep=(0,))


def test_a_slice_keeps_a_parameter_a_parameter_and_a_buffer_a_buffer() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    names = ("0.weight", "0.bias", "1.running_mean")
    expected = {name: model.state_dict()[name][[1, 4]].clone() for name in names}
    keep(Slice(tensors=names, axis=0, keep=(1, 4))).replay(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].bias.requires_grad
    assert "running_mean" in dict(model[1].named_buffers())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": ""}, "whole network"),
        ({"module": "7"}, "does not have"),
        ({"module": "0.weight"}, "does not have"),
        ({"module": "0", "gather": "0-4"}, "5 channels around '0', which reads 2"),
        ({"module": "0", "scatter": "0-4", "width": 8}, "5 channels around '0', which makes 6"),
        ({"module": "0", "scatter": "0-5", "width": 5}, "width"),
        ({"module": "0", "scatter": "0-5"}, "width"),
        ({"module": "2", "taps": True}, "taps belong to a convolution"),
    ],
)
def test_adapters_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(GraphError, match=message):
        Adapt(**settings).replay(model)
    assert str(model) == str(network())


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, 1.5])
def test_widths_that_are_absurd(value: float) -> None:
    with pytest.raises(ValidationError):
        EDITS.validate_python({"kind": "adapt", "module": "0", "scatter": "0", "width": value})


def test_a_file_may_not_add_fields_or_kinds() -> None:
    for extra in ({"kind": "keep", "group": "g", "slices": [], "code": "x"}, {"kind": "eval", "module": "0"}, {}):
        with pytest.raises(ValidationError):
            EDITS.validate_python(extra)


@pytest.mark.parametrize(
    "values",
    [
        {"shape": (65536, 65536, 3)},
        {"shape": (3, 10**9, 1)},
        {"shape": ()},
        {"shape": (3, 0, 8)},
        {"shape": (1,), "mean": (float("nan"),)},
        {"shape": (1,), "std": (float("inf"),)},
        {"shape": (1,), "std": (0.0,)},
    ],
)
def test_inputs_that_are_absurd(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InputSpec(**values)
