"""A network without its data: a copy on torch's `meta` device, where shapes are computed and nothing else.

Counting there is exact, takes no memory for weights or activations, and can't disturb the network that is measured.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tersenet.errors import TersenetError


def call(model: nn.Module, example: Any) -> Any:
    """`model(example)`: a tuple gives the positional arguments, a dict the keyword ones, all else is the one input."""
    if isinstance(example, tuple):
        return model(*cast(tuple[Any, ...], example))
    if isinstance(example, dict):
        return model(**cast(dict[str, Any], example))
    return model(example)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of any nesting of tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with every tensor replaced."""
    return pytree.tree_map_only(Tensor, function, value)


def meta_copy(model: nn.Module) -> nn.Module:
    """The same network in eval mode on `meta`. The original is neither changed nor moved, and no weight is copied."""
    # What deepcopy finds in its memo it does not copy: the tensors never are, wherever a module keeps them.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tensors_in(vars(module)):
            memo[id(tensor)] = _to_meta(tensor)
    return copy.deepcopy(model, memo).eval()


def meta_example(example: Any) -> Any:
    """The same nesting with tensors of the same shapes and types on `meta`."""
    return map_tensors(_to_meta, example)


def run_on_meta(copied: nn.Module, inputs: Any) -> None:
    """One forward of a network made by `meta_copy`, on inputs made by `meta_example`.

    Raises: TersenetError if it needs the values of its tensors, or does not take this example.
    """
    try:
        # no_grad rather than inference_mode: operators then arrive taken apart, with the temporaries they make inside.
        with torch.no_grad(), torch.device("meta"):
            call(copied, inputs)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs)) or "none"
        raise TersenetError(
            f"{type(copied).__name__} can't be measured with an example of shape {shapes}{_line(error)}: "
            f"{reason.rstrip('.') or type(error).__name__}. Its forward has to take the example, and must not read the "
            "values of tensors (.item(), if tensor > 0, .numpy()): torch.where chooses without"
        ) from error


def _line(error: Exception) -> str:
    """` (at net.py:12)`: the line of the network's own code that failed, if it is not torch's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    own = [f for f in frames if "tersenet/measuring" not in f.filename]
    return f" (at {own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno})" if own else ""


def _to_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
