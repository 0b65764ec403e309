"""Torch-Pruning on the same network, the same weights and the same example: zero hints, only the classes protected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.any_cnn.ours import EXACT, RATE, one_line
from benchmarks.any_cnn.subjects import Subject, build, cost, difference, outputs
from torch import Tensor, nn


def prune(name: str) -> Iterator[dict[str, Any]]:
    """Keys as `ours.prune` has them. `ok` means that a forward pass runs; `exact`, that it also computes the right
    thing, as far as the kept channels can be found again by the values of the weights."""
    subject = build(name)
    try:
        remove_half(subject)
        outputs(subject.model, subject.example(subject.small))
    except Exception as error:
        yield {"result": "failed", "reason": one_line(error)}
        return
    after = cost(subject)
    yield {"result": "ok", "after": {key: after[key] for key in ("macs", "params")}}
    try:
        error = check(subject)
        yield {"error": error, "exact": error <= EXACT}
    except Exception as error:
        yield {"unchecked": one_line(error)}


def remove_half(subject: Subject) -> None:
    import torch_pruning as tp

    pruner = tp.pruner.BasePruner(
        subject.model,
        subject.example(subject.small),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATE,
        ignored_layers=class_layers(subject),
    )
    pruner.step()


def class_layers(subject: Subject) -> list[nn.Module]:
    """Layers that give the classes, and a detector's heads whole, as its own example script does."""
    if subject.kind == "detection":
        parts = [getattr(subject.model, part, None) for part in ("head", "rpn", "roi_heads")]
        return [m for part in parts if part is not None for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    sizes = ("out_features", "out_channels")
    return [m for m in subject.model.modules() if any(getattr(m, s, None) == subject.classes for s in sizes)]


def check(subject: Subject) -> float:
    batch = 1 if subject.kind == "detection" else 2
    example = subject.example(subject.small, batch, seed=1)
    compacted = outputs(subject.model, example)
    pruned = dict(subject.model.named_parameters())
    masked = build(subject.name).model
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name in pruned and pruned[name].shape != parameter.shape:
                parameter.copy_(_only(parameter, pruned[name]))
    return difference(outputs(masked, example), compacted)


def _only(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` with zeros outside the rows, columns, ... that `part` still has, found by their values."""
    order = whole.flatten().argsort()
    values = whole.flatten()[order]
    index: list[Tensor] = []
    for axis in range(part.dim()):
        line = part
        for other in reversed(range(part.dim())):
            line = line if other == axis else line.select(other, 0)
        at = torch.searchsorted(values, line.contiguous()).clamp(max=len(values) - 1)
        if not bool((values[at] == line).all()):
            raise ValueError("weights were changed, not only removed")
        index.append(torch.unravel_index(order[at], whole.shape)[axis])
    left = torch.zeros_like(whole)
    grid = torch.meshgrid(*index, indexing="ij")
    left[grid] = whole[grid]
    if not torch.equal(left[grid], part):
        raise ValueError("weights were moved, not only removed")
    return left
