"""Networks that torch.export does not take, such as detectors: parts lowered, inside the network's own forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tersenet.errors import GraphError, TersenetError
from tersenet.graph.copies import copied
from tersenet.lowering.report import LoweredReport

if TYPE_CHECKING:
    from tersenet.lowering.lower import Lowered

Lower = Callable[[nn.Module, tuple[Tensor, ...]], "Lowered"]


class _Part:
    """The forward of a module that is lowered for inputs of one size; others go the module's own way."""

    def __init__(self, own: Callable[..., Any], fast: Lowered) -> None:
        self._own, self._fast = own, fast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or self._fast.problem(args) is not None:
            return self._own(*args, **kwargs)
        return self._fast(*args)


def lower_parts(
    model: nn.Module, inputs: tuple[Tensor, ...], lower: Lower
) -> tuple[nn.Module, dict[str, LoweredReport]]:
    """A copy of `model` in which the largest modules that can be lowered are, and their reports by path: none where no
    module can, or where the network does not run on `inputs`.

    A module can be lowered if it holds a convolution's weight and is called with tensors.
    """
    network = copied(model).eval()
    calls = _calls(network, inputs)
    reports: dict[str, LoweredReport] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if child in seen or not any(p.dim() == 4 for p in child.parameters()):
                continue
            seen.add(child)
            here = f"{path}{name}"
            try:
                fast = lower(child, calls[child])
            except GraphError:  # its own parts have been tried
                continue
            except (KeyError, TersenetError):  # it is not called with tensors of one batch
                visit(child, f"{here}.")
                continue
            if not fast.report.kept:
                # The module itself stays: its owner may read other attributes of it.
                vars(child)["forward"] = _Part(child.forward, fast)
            reports[here] = fast.report

    visit(network, "")
    return network, reports


def _calls(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Module -> the largest inputs that it was called with in a pass, as zeros; only of modules that take tensors."""
    calls: dict[nn.Module, tuple[Tensor, ...]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs or not args or not all(isinstance(x, Tensor) for x in args):
            return
        size = sum(x.numel() for x in args)
        if size > sum(x.numel() for x in calls.get(module, ())):
            # Zeros that take no memory; what is no floating point number may be an index.
            calls[module] = tuple(x.new_zeros(()).expand(x.shape) if x.is_floating_point() else x for x in args)

    with ExitStack() as stack:
        for module in network.modules():
            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            network(*(x.clone() for x in inputs))
        except Exception:  # then its error is that of torch.export
            return {}
    return calls


def merged(reports: Mapping[str, LoweredReport], reason: str, batch: int, threads: int) -> LoweredReport:
    """One report of a network whose parts are lowered."""
    layers = [replace(one, name=f"{path}.{one.name}") for path, found in reports.items() for one in found.layers]
    other = sum((Counter(found.other) for found in reports.values()), Counter[str]())
    notes = [f"{reason} So only parts are lowered, and checked one by one: {', '.join(reports)}"]
    notes += [f"{path}: {note}" for path, found in reports.items() for note in found.notes]
    return LoweredReport(
        tuple(layers),
        max(found.error for found in reports.values()),
        sum(found.folded for found in reports.values()),
        dict(other),
        batch,
        threads,
        tuple(notes),
    )
