"""Which layers: by name, type and position, with an error that offers the nearest names.

A pattern is a name with wildcards (`layer1.*`, where a `*` also matches dots), `type:` with one of `TYPES`, or
`position:first` or `position:last` of the layers that can be pruned. A depthwise convolution makes no channels of its
own: its name, and `type:depthwise`, stand for the layers whose channels it filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tersenet.errors import GraphError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.graph.units import ChannelGroup

TYPES = ("type:conv", "type:depthwise", "type:grouped", "type:linear", "type:transposed")
POSITIONS = ("position:first", "position:last")
Layers = dict[str, frozenset[str]]
"""Layer -> the names, the type and the position that patterns can match."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """`layer1.*` style patterns; a `*` also matches dots, but never a type or position."""
    return any(fnmatchcase(name, p) and (":" in p or ":" not in name) for p in patterns)


def check_patterns(patterns: Iterable[str], layers: Sequence[str]) -> None:
    """Raises: UnknownNameError for a pattern that matches no layer, or is of no known type or position."""
    for pattern in patterns:
        known = [*TYPES, *POSITIONS] if pattern.startswith(("type:", "position:")) else layers
        if not any(matches(name, [pattern]) for name in known):
            if known is layers:
                raise UnknownNameError("layer", pattern, known, "`tersenet measure MODEL --layers` lists them all.")
            raise UnknownNameError("kind of layer", pattern, known, f"Known: {', '.join(known)}.")


def select_groups(
    graph: ModelGraph, include: Sequence[str], exclude: Sequence[str], default_exclude: Sequence[str] = ()
) -> list[ChannelGroup]:
    """Groups that can be pruned, all of whose layers are included and none excluded.

    `default_exclude` excludes too, but its patterns may match nothing: they are meant for any network.

    Raises:
        UnknownNameError: an `include` or `exclude` pattern that matches nothing.
        GraphError: no group is left.
    """
    if not graph.groups:
        raise GraphError(_nothing_left(graph))
    check_patterns([*include, *exclude], _names(graph, graph.groups))
    free = [group for group in graph.groups if group.frozen is None]
    chosen: list[ChannelGroup] = []
    for group in free:
        layers = _layers(graph, group, free)
        out = [*exclude, *default_exclude]
        if all(matches_any(names, include) and not matches_any(names, out) for names in layers.values()):
            chosen.append(group)
    if not chosen:
        raise GraphError(_nothing_left(graph))
    return chosen


def named_rates(graph: ModelGraph, groups: Sequence[ChannelGroup], rates: Mapping[str, float]) -> dict[str, float]:
    """Group name -> the rate of the first pattern in `rates` that matches it or one of its layers.

    Raises:
        UnknownNameError: a pattern that matches none of these groups.
    """
    check_patterns(rates, [*_names(graph, groups), *(group.name for group in groups)])
    found: dict[str, float] = {}
    for group in groups:
        layers = [*_layers(graph, group, groups).values(), frozenset({group.name})]
        matching = (rate for pattern, rate in rates.items() if any(matches_any(names, [pattern]) for names in layers))
        rate = next(matching, None)
        if rate is not None:
            found[group.name] = rate
    return found


def left_whole(graph: ModelGraph, chosen: Sequence[ChannelGroup]) -> dict[str, list[str]]:
    """Reason -> the groups that are not among `chosen` for it."""
    names = {group.name for group in chosen}
    found: dict[str, list[str]] = {}
    for group in graph.groups:
        if group.name not in names:
            reason = group.frozen or "left out by include or exclude, or tied to a layer that is"
            found.setdefault(reason, []).append(group.name)
    return found


def _nothing_left(graph: ModelGraph) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in graph.frozen_groups().items())
    text = f"no layer is left to prune (include, exclude, or frozen: {reasons or 'no layer makes channels'})"
    layers = [path for path, module in graph.model.named_modules() if is_parametrized(module) or _spectral(module)]
    if layers:
        text += (
            f". {', '.join(layers[:5])}{' and more' * (len(layers) > 5)}: the weights are computed anew in each pass, "
            "by a norm or another parametrization of all channels. Make them plain before, with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or with "
            "torch.nn.utils.remove_spectral_norm(layer) if the older spectral_norm was used"
        )
    return text


def _spectral(module: nn.Module) -> bool:
    """Whether it has the hook of the older `spectral_norm`, whose class is hidden behind the function of that name."""
    return any(type(hook).__name__ == "SpectralNorm" for hook in vars(module)["_forward_pre_hooks"].values())


def matches_any(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """`matches` for any of a layer's names, types and positions."""
    return any(matches(name, patterns) for name in names)


def _names(graph: ModelGraph, groups: Sequence[ChannelGroup]) -> list[str]:
    layers = (names for group in groups for names in _layers(graph, group, ()).values())
    return list(dict.fromkeys(name for names in layers for name in sorted(names) if ":" not in name))


def _layers(graph: ModelGraph, group: ChannelGroup, free: Sequence[ChannelGroup]) -> Layers:
    """The layers that make a group's channels. `free` are the groups that first and last are found in."""
    depthwise = [
        end.layer
        for end in (graph.ends[member.end] for member in group.members)
        if end.role == "pass" and end.tensors and graph.tensor(end.tensors[0]).dim() > 2
    ]
    ends = {free[0].producers[0]: "position:first", free[-1].producers[-1]: "position:last"} if free else {}
    own = {"type:depthwise", *depthwise} if depthwise else set[str]()
    found: Layers = {}
    for member in group.members:
        end = graph.ends[member.end]
        if end.role == "produce":
            dims = graph.tensor(end.tensors[0]).dim()
            tags = {end.layer, _type(graph, end.layer, dims), *own}
            found[end.layer] = frozenset(tags | ({ends[end.layer]} if end.layer in ends else set()))
    return found


def _type(graph: ModelGraph, layer: str, dims: int) -> str:
    if dims <= 2:
        return "type:linear"
    module = graph.model.get_submodule(layer)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return "type:transposed"
    return "type:grouped" if getattr(module, "groups", 1) > 1 else "type:conv"
