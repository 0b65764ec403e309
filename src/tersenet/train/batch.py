"""Batches of whatever a data set gives: one tensor, several inputs, or a dict."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tersenet.errors import TersenetError
from tersenet.graph.record import record_of


def move(value: Any, device: torch.device, channels_last: bool = False) -> Any:
    """`value` with every tensor in it on `device`; with `channels_last`, 4-d ones in NHWC memory order."""
    if isinstance(value, Tensor):
        layout = torch.channels_last if channels_last and value.dim() == 4 else torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=layout)
    return _each(value, partial(move, device=device, channels_last=channels_last))


def to_float32(value: Any) -> Any:
    """`value` with every half-precision tensor in it in float32, so that losses are computed in it."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return _each(value, to_float32)


def forward(network: nn.Module, inputs: Any) -> Any:
    """Calls `network` with one tensor, with a list or tuple as several inputs, or with a dict as named ones.

    Raises:
        TersenetError: the network can't take such inputs.
    """
    try:
        if isinstance(inputs, (list, tuple)):
            return network(*cast("list[Any]", inputs))
        if isinstance(inputs, dict):
            return network(**cast("dict[str, Any]", inputs))
        return network(inputs)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TersenetError(
            f"{_name(network)} failed on a batch of inputs {_shapes(inputs)}: {reason}. If it is made for other "
            "inputs, choose data of their shape, or another network; `tersenet models` lists what each built-in one "
            "takes."
        ) from error


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether these are logits (N, classes) and integer labels (N,)."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return False
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    return outputs.dim() == 2 and outputs.is_floating_point() and whole and targets.shape == outputs.shape[:1]


def correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Of how many samples the label is among the `k` largest logits, a scalar."""
    largest = logits.topk(min(k, logits.shape[1])).indices
    return (largest == labels[:, None]).sum()


def cross_entropy(outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy. Raises: TersenetError if outputs and targets don't fit it or each other."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        raise TersenetError(
            f"the network gives a {type(outputs).__name__} and the data a {type(targets).__name__} as target, which "
            "cross entropy can't compare: give the data a loss function of its own"
        )
    try:
        return functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        raise TersenetError(
            f"cross entropy of outputs {tuple(outputs.shape)} with targets {tuple(targets.shape)} ({targets.dtype}) "
            f"failed: {error}. The network needs one output per class, or the data a loss function of its own."
        ) from error


def _name(network: nn.Module) -> str:
    """What the user called it, or else its class."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    record = record_of(network)
    return record.base if record is not None and record.base is not None else type(network).__name__


def _shapes(value: Any) -> str:
    """`(250, 1, 8, 8)`; of several inputs, each one's."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shapes(part)}" for name, part in cast("dict[str, Any]", value).items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shapes(part) for part in cast("list[Any]", value))
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to each part of a list, tuple or dict."""
    if isinstance(value, dict):
        return {key: change(part) for key, part in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        parts = [change(part) for part in cast("list[Any]", value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
