"""A network's parts by their names, as fast as dictionaries are: torch's own lookup costs ten times that."""

from __future__ import annotations

from torch import Tensor, nn


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Raises: AttributeError if there is none."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name)  # pyright: ignore[reportPrivateUsage]
        if module is None:
            # A module that hands on what it wraps.
            return model.get_submodule(path)
    return module


def own_tensor(owner: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter or buffer."""
    found = owner._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
    return found if found is not None else owner._buffers.get(name)  # pyright: ignore[reportPrivateUsage]


def tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter, a buffer, or another tensor that a module keeps. Raises: AttributeError if there is none."""
    path, _, leaf = name.rpartition(".")
    owner = submodule(model, path)
    found = own_tensor(owner, leaf)
    return found if found is not None else getattr(owner, leaf)
