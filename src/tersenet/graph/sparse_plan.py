"""Which convolutions of a network get their weight into the Winograd domain, or a mask, and which linear layers a mask;
and which can't and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn

from tersenet.errors import TersenetError
from tersenet.graph.convolutions import Convolution, by_value, convolutions, has_hooks, listed, tags
from tersenet.graph.edits_sparse import Sparsify, WinogradDomain
from tersenet.graph.model import ModelGraph
from tersenet.graph.relu_pairs import check_moved, movable_relus
from tersenet.graph.select import check_patterns, matches_any
from tersenet.graph.shrink import shares_weight
from tersenet.graph.trace import evaluating
from tersenet.nn.masked import MaskedConv2d, MaskedLinear, MaskedWeight
from tersenet.nn.winograd_quantizer import directly
from tersenet.nn.winograd_relu import WinogradReLUConv2d, hindrance
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings

Mode = Literal["winograd_relu", "native", "spatial"]
Others = Literal["leave", "native"]
Linear = Literal["dense", "hidden", "all"]
_LEFT_OUT = "left out by include or exclude"
_LINEAR_OUT = "left out by include or exclude, not run, or the last linear layer, which only `linear: all` takes"


@dataclass
class SparsePlan:
    """`layers`: those of the mode, after the edits; `before` of them were there, `linear` are to get a mask. `left`:
    layer -> why it stays out, `native`: why its ReLU does. `spatial` and `products` are multiplications per image of
    the new convolutions, by direct convolution and as planned."""

    layers: list[str] = field(default_factory=list[str])
    before: list[str] = field(default_factory=list[str])
    linear: list[str] = field(default_factory=list[str])
    edits: list[WinogradDomain | Sparsify] = field(default_factory=list[WinogradDomain | Sparsify])
    left: dict[str, str] = field(default_factory=dict[str, str])
    native: dict[str, str] = field(default_factory=dict[str, str])
    spatial: int = 0
    products: int = 0

    def reasons(self) -> str:
        """Why layers stay out, each reason once."""
        return "; ".join(f"{', '.join(names)}: {why}" for why, names in by_value(self.left).items())

    def notes(self, what: str) -> list[str]:
        new = [edit.module for edit in self.edits if edit.module not in self.native]
        notes = [f"{len(new)} layers {what}: {listed(new)}"] if new else []
        if self.linear:
            notes.append(f"{len(self.linear)} linear layers with a mask: {listed(self.linear)}")
        if self.before:
            notes.append(f"{len(self.before)} layers were so before: {listed(self.before)}")
        if self.products and self.products != self.spatial:
            notes.append(f"products per image of these layers, dense: {self.spatial:,} -> {self.products:,}")
        notes += [f"{listed(names)} without their ReLU: {why}" for why, names in by_value(self.native).items()]
        return notes + [f"{listed(names)} left as is: {why}" for why, names in by_value(self.left).items()]


def layers_of(graph: ModelGraph, mode: Mode, others: Others, linear: Linear) -> dict[str, MaskedWeight]:
    """Layers that are of this mode already, in the order in which the network holds them."""
    relu = {mode == "winograd_relu", False} if others == "native" else {mode == "winograd_relu"}
    found: dict[str, MaskedWeight] = {}
    for name, module in graph.model.named_modules():
        if isinstance(module, WinogradReLUConv2d):
            is_own = mode != "spatial" and module.settings.relu in relu
        elif isinstance(module, (MaskedConv2d, MaskedLinear)):
            is_own = mode == "spatial" if isinstance(module, MaskedConv2d) else linear != "dense"
        else:
            continue
        if is_own:
            found[name] = module
    return found


def selected(graph: ModelGraph, include: Sequence[str], exclude: Sequence[str], linear: Linear) -> list[str]:
    """Convolutions, those of ours too, that these patterns choose, and linear layers: the same before and behind a
    conversion. Positions are those of the convolutions.

    Raises: UnknownNameError for a pattern that matches nothing.
    """
    order: dict[str, nn.Module] = {}
    kinds = (nn.Conv2d, WinogradReLUConv2d) if linear == "dense" else (nn.Conv2d, WinogradReLUConv2d, nn.Linear)
    layers = {n: m for n, m in graph.model.named_modules() if isinstance(m, kinds)}
    if not layers:
        return []
    handles = [m.register_forward_pre_hook(partial(_see, order, n)) for n, m in layers.items()]
    try:
        with torch.no_grad(), directly(), evaluating(graph.model):
            graph.model(*graph.example)
    finally:
        for handle in handles:
            handle.remove()
    check_patterns([*include, *exclude], list(layers))
    own = tags({name: layer for name, layer in order.items() if not isinstance(layer, nn.Linear)})
    linears = [name for name in order if name not in own]
    own |= {name: frozenset([name]) for name in (linears if linear == "all" else linears[:-1])}
    return [name for name, tag in own.items() if matches_any(tag, include) and not matches_any(tag, exclude)]


def _see(order: dict[str, nn.Module], name: str, module: nn.Module, _: object) -> None:
    order.setdefault(name, module)


def sparse_plan(
    graph: ModelGraph,
    mode: Mode,
    others: Others,
    settings: WinogradReLUSettings,
    include: Sequence[str],
    exclude: Sequence[str],
    linear: Linear = "dense",
) -> SparsePlan:
    """Nothing is changed.

    Raises: TersenetError for a pattern that matches nothing, or if no layer is left.
    """
    found, left = convolutions(graph)
    before = layers_of(graph, mode, others, linear)
    wanted = selected(graph, include, exclude, linear)
    plan = SparsePlan(before=[name for name in before if name in wanted])
    plan.left = {name: why for name, why in left.items() if name not in before}
    chosen: dict[str, Convolution] = {}
    for conv in found:
        reason = _LEFT_OUT if conv.name not in wanted else _hindrance(graph, conv, mode)
        if reason is None:
            chosen[conv.name] = conv
        else:
            plan.left[conv.name] = reason
    if linear != "dense":
        _add_linears(graph, plan, wanted)
    if mode == "spatial":
        plan.edits = [Sparsify(module=name) for name in chosen]
    elif mode == "native":
        plan.edits = [WinogradDomain(module=name, settings=settings) for name in chosen]
    else:
        plan.edits = _with_relus(graph, settings, others, plan, [*chosen])
    new = [edit.module for edit in plan.edits]
    plan.layers = [*new, *plan.linear, *plan.before]
    plan.spatial = sum(chosen[name].multiplications() for name in new)
    plan.products = sum(chosen[name].multiplications(None if mode == "spatial" else settings.tile) for name in new)
    if not plan.layers:
        reasons = plan.reasons() or "the network has no convolution"
        raise TersenetError(f"no layer is left for sparse_winograd ({reasons})")
    return plan


def _hindrance(graph: ModelGraph, conv: Convolution, mode: Mode) -> str | None:
    reason = hindrance(conv.module)
    if reason is None and conv.module.kernel_size != (3, 3):
        reason = f"its kernel is {'x'.join(map(str, conv.module.kernel_size))}"
    if reason is None and mode != "spatial" and min(conv.sides) < 2:
        reason = f"its map is {conv.outputs[2]}x{conv.outputs[3]}: no tile fits"
    if reason is None and mode == "spatial" and shares_weight(graph.model, conv.name):
        reason = "it shares its weight with another layer, which the mask would not know of"
    return reason


def _add_linears(graph: ModelGraph, plan: SparsePlan, wanted: list[str]) -> None:
    for name, module in graph.model.named_modules():
        if isinstance(module, nn.Linear) and name not in plan.before:
            reason = _linear_hindrance(graph, name, module) if name in wanted else _LINEAR_OUT
            if reason is None:
                plan.linear.append(name)
            else:
                plan.left[name] = reason


def _linear_hindrance(graph: ModelGraph, name: str, module: nn.Linear) -> str | None:
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, which computes in a way of its own"
    if has_hooks(module):
        return "it has hooks, such as the older weight_norm's"
    if shares_weight(graph.model, name):
        return "it shares its weight with another layer, which the mask would not know of"
    return None if name else "it is the whole network"


def _with_relus(
    graph: ModelGraph, settings: WinogradReLUSettings, others: Others, plan: SparsePlan, names: list[str]
) -> list[WinogradDomain | Sparsify]:
    left: dict[str, str] = {}
    # A layer that falls out may have shared its ReLU with one that then can't have it either; so it is begun anew.
    while True:
        relus, none = movable_relus(graph, [name for name in names if name not in left])
        edits = [WinogradDomain(module=name, settings=settings, relu=relu) for name, relu in relus.items()]
        wrong = check_moved(graph, edits)
        left |= none | dict.fromkeys(wrong, "with its ReLU moved the network computes something else")
        if not none and not wrong:
            break
    if others == "leave":
        plan.left |= left
        return list(edits)
    plan.native = left
    linear = settings.model_copy(update={"relu": False})
    return [*edits, *(WinogradDomain(module=name, settings=linear) for name in left)]
