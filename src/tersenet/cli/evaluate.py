"""tersenet eval"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.cli import options
from tersenet.cli.console import examples, note_random_weights, show

if TYPE_CHECKING:
    from tersenet.results import Accuracy

EXAMPLES = examples(
    "tersenet eval resnet56 --weights resnet56-4bfd9763.th --data cifar10:data/cifar10",
    "tersenet eval runs/r56/model --data cifar10:data/cifar10 --device cuda --json",
)


def evaluate(
    model: options.ModelArgument,
    data: options.DataOption,
    weights: options.WeightsOption = None,
    base: options.BaseOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch; changes only speed.")] = 250,
    device: options.DeviceOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Accuracy on the test set, with the number of right answers and a 95 % interval."""
    from tersenet.data.registry import DataSettings, parse

    parse(data)
    from tersenet import api

    settings = DataSettings(source=data, eval_batch_size=batch_size)
    accuracy = api.evaluate(model, settings, weights=weights, device=device, base=base)
    document = {"model": model, "weights": weights, "data": data, **accuracy.model_dump(mode="json")}
    note_random_weights(model, weights)
    show(document, lambda: describe(accuracy), as_json)


def describe(accuracy: Accuracy) -> str:
    """`93.39 % (9339 of 10000), 95 % interval 92.89 to 93.86 %`, and what else was measured."""
    parts: list[str] = []
    if accuracy.top1 is not None:
        parts.append(f"{accuracy.top1:.2%} ({accuracy.correct} of {accuracy.n})".replace("%", " %"))
    if accuracy.top1_low is not None and accuracy.top1_high is not None:
        parts.append(f"95 % interval {100 * accuracy.top1_low:.2f} to {100 * accuracy.top1_high:.2f} %")
    if accuracy.top5 is not None:
        parts.append(f"top-5 {100 * accuracy.top5:.2f} %")
    if accuracy.metric is not None:
        parts.append(f"metric {accuracy.metric:.6g} over {accuracy.n} samples")
    if accuracy.loss is not None:
        parts.append(f"loss {accuracy.loss:.4f}")
    return ", ".join(parts)
