"""A network's parts and their names, as fast as dictionaries are: torch's own lookup costs ten times that."""

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


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules in torch's order, each under its first name."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        children = module._modules  # pyright: ignore[reportPrivateUsage]
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + n, m) for n, m in reversed(children.items()) if m is not None]
    return found


def names_of_tensors(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter or buffer -> all its names, the first owner's first: a tensor may have several."""
    names: dict[int, list[str]] = {}
    for path, module in named_modules(model).items():
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in table.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(prefix + name)
    return names


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
