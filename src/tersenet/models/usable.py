"""What a network must be so that it can be compressed: checked before anything is done, with one clear message."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from tersenet.errors import TersenetError

_MOST_NAMES = 5


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, `DataParallel` and `DistributedDataParallel`: they hold no weights of their
    own, and a network is compiled or spread again when it is smaller."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_usable(model: nn.Module, inputs: int | None) -> None:
    """Raises: TersenetError for a network that can't be compressed, whatever the recipe.

    Args:
        inputs: how many tensors its forward gets, where that is known.
    """
    name = type(model).__name__
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        which = name if isinstance(model, torch.jit.ScriptModule) else f"{_some(scripted)} of {name}"
        raise TersenetError(
            f"{which} is a TorchScript module, whose layers can't be changed: pass the nn.Module that it was made "
            "from, and script the smaller one"
        )
    held = [*model.named_parameters(), *model.named_buffers()]
    lazy = [path for path, tensor in held if is_lazy(tensor)]
    if lazy:
        raise TersenetError(f"{_some(lazy)} of {name} has no shape yet (a lazy layer): run {name} on a batch first")
    if not any(parameter.dim() > 1 for parameter in model.parameters()):
        raise TersenetError(f"{name} has no convolution or linear layer, so there is nothing to make smaller")
    empty = [path for path, tensor in held if tensor.is_meta]
    if empty:
        raise TersenetError(
            f"{_some(empty)} of {name} is on the meta device and has no values: load its weights first "
            f"({name}.to_empty(device='cpu'), then load_state_dict)"
        )
    strange = [path for path, tensor in held if _is_nan(tensor)]
    if strange:
        raise TersenetError(
            f"{_some(strange)} of {name} holds NaN: what channels are worth can't be told. Start from weights "
            "of before the training diverged"
        )
    if inputs is not None:
        _check_forward(model, inputs)


def _is_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _check_forward(model: nn.Module, inputs: int) -> None:
    """Whether forward takes so many tensors by position."""
    name = type(model).__name__
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * inputs)
    except TypeError as error:
        named = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        way = (
            f"it takes {', '.join(named)} by name only: pass a module whose forward takes them by position and calls it"
            if named
            else "give an example with as many tensors as it takes: example=(x, y)"
        )
        raise TersenetError(
            f"{name}.forward{signature} can't be called with {inputs} tensor{'s' * (inputs > 1)} by position "
            f"({error}); {way}"
        ) from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
