"""How right a network is: exact counts, summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersenet.data.bundle import first_tensor
from tersenet.errors import NotFiniteError, TersenetError
from tersenet.results import Accuracy
from tersenet.train import distributed
from tersenet.train.batch import correct, cross_entropy, forward, is_classification, move

if TYPE_CHECKING:
    from tersenet.data.bundle import Loader


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device | str,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[[Any, Any], Tensor] | None = None,
) -> Accuracy:
    """Accuracy of `model` in eval mode over all batches of `loader`; the mode of each module is restored.

    `loss` gives a batch's mean (None: cross entropy), `metric` one score per sample. top-1 and top-5 are None unless
    outputs are logits (N, classes) and targets integers (N,). Under torchrun the counts are the sums over the ranks'
    shares, equal on all of them.

    Raises:
        TersenetError: no samples, or a metric of another shape.
        NotFiniteError: a mean loss or metric that is NaN or infinite.
    """
    device = torch.device(device)
    model.to(device)
    # samples; samples with a top-1; right in 1; right in 5; samples with a loss; sum of losses; sum of scores
    totals = torch.zeros(7, dtype=torch.float64)
    with _eval_mode(model), torch.inference_mode():
        for inputs, targets in loader.batches(0):
            inputs, targets = move(inputs, device, channels_last=True), move(targets, device)
            outputs = forward(model, inputs)
            totals += torch.tensor(
                _figures(outputs, targets, len(first_tensor(inputs)), loss, metric), dtype=torch.float64
            )
    return _accuracy(distributed.all_reduce_sum(totals, device).tolist(), metric is not None)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of which `right` of `n` samples were counted.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    z = 1.959963984540054
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _figures(
    outputs: Any,
    targets: Any,
    n: int,
    loss: Callable[[Any, Any], Tensor] | None,
    metric: Callable[[Any, Any], Tensor] | None,
) -> list[float]:
    figures = [float(n), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    classification = is_classification(outputs, targets)
    if classification:
        figures[1:4] = n, float(correct(outputs, targets)), float(correct(outputs, targets, 5))
    # A metric alone is enough where cross entropy means nothing.
    if loss is not None or classification or metric is None:
        figures[4:6] = n, n * float((loss or cross_entropy)(outputs, targets))
    if metric is not None:
        scores = torch.as_tensor(metric(outputs, targets))
        if scores.shape != (n,):
            raise TersenetError(f"the metric gave {tuple(scores.shape)} scores for {n} samples: it must give ({n},)")
        figures[6] = float(scores.double().sum())
    return figures


def _accuracy(totals: list[float], has_metric: bool) -> Accuracy:
    n = int(totals[0])
    if n == 0:
        raise TersenetError("there is nothing to evaluate on: the data split has no samples")
    # Only a loss that every sample took part in, and a count of all, is worth reporting.
    loss = totals[5] / n if totals[4] == n else None
    score = totals[6] / n if has_metric else None
    for name, value in (("loss", loss), ("metric", score)):
        if value is not None and not math.isfinite(value):
            raise NotFiniteError(f"the mean {name} over {n} samples is {value}: the network's outputs are not finite")
    right = int(totals[2]) if totals[1] == n else None
    low, high = wilson(right, n) if right is not None else (None, None)
    return Accuracy(
        n=n,
        loss=loss,
        top1=right / n if right is not None else None,
        top5=totals[3] / n if right is not None else None,
        top1_low=low,
        top1_high=high,
        correct=right,
        metric=score,
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    # Module by module: some may be frozen in eval mode on purpose.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
