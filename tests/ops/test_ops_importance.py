"""Scores against slow plain loops, and what must hold for each of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersenet.ops import importance


def matrix(seed: int = 0, rows: int = 6, columns: int = 5) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(name: str, rows: list[list[float]]) -> list[float]:
    if name == "l1":
        return [sum(abs(x) for x in row) for row in rows]
    if name == "l2":
        return [math.sqrt(sum(x * x for x in row)) for row in rows]
    return [sum(math.dist(row, other) for other in rows) for row in rows]


@pytest.mark.parametrize("name", importance.FILTER_SCORES)
def test_filter_scores(name: str) -> None:
    filters, score = matrix(), importance.FILTER_SCORES[name]
    assert score(filters).tolist() == pytest.approx(plain(name, filters.tolist()))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(score(filters[order]), score(filters)[order])
    torch.testing.assert_close(score(-3 * filters), 3 * score(filters))


def test_fpgm_is_about_distance_and_not_about_size() -> None:
    filters = matrix()
    torch.testing.assert_close(importance.fpgm(filters + 7), importance.fpgm(filters))
    assert importance.fpgm(torch.ones(4, 3)).eq(0).all()


def test_taylor() -> None:
    weights, gradients = matrix(1), matrix(2)
    expected = [sum(abs(w * g) for w, g in zip(*rows, strict=True)) for rows in zip(weights, gradients, strict=True)]
    assert importance.taylor(weights, gradients).tolist() == pytest.approx([float(x) for x in expected])
    assert importance.taylor(weights, torch.zeros_like(weights)).eq(0).all()


def test_activation_statistics() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert importance.activation(values).tolist() == [0, 1, 2]
    assert importance.apoz(values).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("name", importance.NORMALISATIONS)
def test_normalising_keeps_the_order_in_a_layer_and_forgets_its_scale(name: str) -> None:
    scores, normalise = matrix(3)[:, 0].abs(), importance.NORMALISATIONS[name]
    assert torch.equal(normalise(scores).argsort(), scores.argsort())
    assert normalise(torch.zeros(3)).eq(0).all()
    if name != "none":
        torch.testing.assert_close(normalise(100 * scores), normalise(scores))


def test_mean_and_maximum_become_one() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0])
    assert importance.by_mean(scores).mean() == 1
    assert importance.by_max(scores).max() == 1


def test_lamp() -> None:
    scores = [0.5, 2.0, 1.0, 3.0]
    expected = [x * x / sum(y * y for y in scores if y >= x) for x in scores]
    assert importance.lamp(torch.tensor(scores)).tolist() == pytest.approx(expected)
    assert max(expected) == 1
