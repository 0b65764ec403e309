from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_support import Batches, network

from tersenet.errors import TersenetError
from tersenet.train.evaluate import evaluate, wilson


class Fixed:
    """A loader of the given batches."""

    def __init__(self, *batches: tuple[Any, Any], n: int = 0) -> None:
        self.given = batches
        self.n = n

    def __len__(self) -> int:
        return len(self.given)

    def batches(self, epoch: int) -> Any:
        return iter(self.given)


LOGITS = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [0, 0, 0, 1, 0, 0]])
LABELS = torch.tensor([0, 4, 5, 3])


def test_counts_and_mean_loss_are_exact_over_uneven_batches() -> None:
    loader = Fixed((LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:]))
    result = evaluate(nn.Identity(), loader, device="cpu")
    assert (result.n, result.correct, result.top1, result.top5) == (4, 2, 0.5, 0.75)
    assert result.loss == pytest.approx(float(functional.cross_entropy(LOGITS, LABELS)), rel=1e-6)
    assert (result.top1_low, result.top1_high) == wilson(2, 4)
    assert result.metric is None


def test_fewer_than_five_classes() -> None:
    result = evaluate(nn.Identity(), Fixed((LOGITS[:2, :3], torch.tensor([0, 1]))), device="cpu")
    assert (result.top1, result.top5) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n, n)[1] == pytest.approx(1)


def test_every_modules_mode_is_restored_and_nothing_is_changed() -> None:
    model = network()
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, Batches(30, 8, 1), device="cpu")
    assert [module.training for module in model] == [True, False] + [True] * 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_modes_are_restored_when_it_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).train()
    with pytest.raises(TersenetError):
        evaluate(model, Fixed((torch.zeros(1, 5), torch.tensor([0]))), device="cpu")
    assert model[0].training


def test_networks_see_channels_last_inputs_without_autograd() -> None:
    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert torch.is_inference_mode_enabled()
            assert not self.training
            return x.mean((2, 3))

    assert evaluate(Look(), Fixed((torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))), device="cpu").n == 2


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


@pytest.mark.parametrize("inputs", [(LOGITS, LOGITS * 0), [LOGITS, LOGITS * 0], {"b": LOGITS * 0, "a": LOGITS}])
def test_several_inputs(inputs: Any) -> None:
    assert evaluate(TwoInputs(), Fixed((inputs, LABELS)), device="cpu").correct == 2


def test_own_loss_and_metric_of_a_network_that_does_not_classify() -> None:
    x, y = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4)

    def scores(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).abs().mean((1, 2, 3))

    result = evaluate(
        nn.Identity(), Fixed((x[:3], y[:3]), (x[3:], y[3:])), device="cpu", loss=functional.mse_loss, metric=scores
    )
    assert result.loss == pytest.approx(float(functional.mse_loss(x, y)), rel=1e-6)
    assert result.metric == pytest.approx(float(-(x - y).abs().mean()), rel=1e-6)
    assert (result.n, result.top1, result.top5, result.correct, result.top1_low) == (5, None, None, None, None)


def test_a_metric_alone_is_enough() -> None:
    pairs = Fixed((torch.zeros(2, 1, 4, 4), [{"box": 1}, {"box": 2}]))
    result = evaluate(nn.Identity(), pairs, device="cpu", metric=lambda outputs, targets: [0.25, 0.75])
    assert (result.metric, result.loss, result.top1) == (0.5, None, None)


def test_segmentation_has_a_loss_and_no_top1() -> None:
    outputs, targets = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    result = evaluate(nn.Identity(), Fixed((outputs, targets)), device="cpu")
    assert result.loss == pytest.approx(float(functional.cross_entropy(outputs, targets)), rel=1e-6)
    assert result.top1 is None


@pytest.mark.parametrize(
    ("loader", "options", "words"),
    [
        (Fixed(), {}, "no samples"),
        (Fixed((LOGITS * math.nan, LABELS)), {}, "mean loss over 4 samples is nan"),
        (Fixed((LOGITS, LABELS + 3)), {}, "one output per class"),
        (Fixed((LOGITS, LABELS[:3])), {}, "outputs (4, 6) with targets (3,)"),
        (Fixed((LOGITS, [1, 2, 3, 4])), {}, "list as target"),
        (Fixed((LOGITS, LABELS)), {"metric": lambda o, t: o.mean()}, "gave () scores for 4 samples"),
    ],
)
def test_what_can_not_be_evaluated_is_said(loader: Fixed, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TersenetError) as caught:
        evaluate(nn.Identity(), loader, device="cpu", **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(4, 1, 8, 8), "Sequential failed on a batch of inputs (4, 1, 8, 8): "),
        ([torch.zeros(4, 2, 6, 6), torch.zeros(4, 3)], "inputs (4, 2, 6, 6), (4, 3): "),
        ({"image": torch.zeros(4, 2, 6, 6)}, "inputs image (4, 2, 6, 6): "),
    ],
)
def test_inputs_that_a_network_can_not_take(inputs: Any, words: str) -> None:
    with pytest.raises(TersenetError) as caught:
        evaluate(network(), Fixed((inputs, LABELS)), device="cpu")
    assert words in str(caught.value)
    assert "choose data of their shape" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_lack_of_memory_is_not_blamed_on_the_inputs() -> None:
    class Big(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Big(), Fixed((LOGITS, LABELS)), device="cpu")
