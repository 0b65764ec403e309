"""Deep copies of networks, also of those that torch itself refuses to copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from tersenet.errors import GraphError


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy that has nothing in common with `model` but the tensors in `shared`.

    torch refuses to copy a tensor with a gradient history, and the older `weight_norm`, `spectral_norm` and
    `torch.nn.utils.prune` leave such a one in the layer: the weight of the last pass, which the next pass computes
    anew. The copy has its values.

    Raises:
        GraphError: a model that holds what can't be copied.
    """
    # What deepcopy finds in its memo it does not copy.
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} can't be copied, which is needed to try a change out and to leave it as it is: "
            f"{error}. Perhaps it holds an open file, a lock or a generator: keep that outside"
        ) from error
