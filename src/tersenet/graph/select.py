"""Which layers: by name patterns, with an error that offers the nearest names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from tersenet.errors import UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.graph.units import ChannelGroup


def matches(name: str, patterns: Iterable[str]) -> bool:
    """`layer1.*` style patterns; a `*` also matches dots."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], layers: Sequence[str]) -> None:
    """Raises: UnknownNameError for a pattern that matches no layer."""
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise UnknownNameError("layer", pattern, layers, "`tersenet measure MODEL --layers` lists them all.")


def select_groups(
    graph: ModelGraph, include: Sequence[str], exclude: Sequence[str], default_exclude: Sequence[str] = ()
) -> list[ChannelGroup]:
    """Groups that can be pruned, all of whose convolutions are included and none excluded.

    `default_exclude` excludes too, but its patterns may match nothing: they are meant for any network.

    Raises:
        UnknownNameError: an `include` or `exclude` pattern that matches nothing.
    """
    layers = list(dict.fromkeys(name for group in graph.groups for name in group.producers))
    check_patterns([*include, *exclude], layers)
    return [
        group
        for group in graph.groups
        if group.frozen is None
        and all(tensor.dim() > 2 for tensor, _, _ in graph.filters(group))
        and all(matches(name, include) and not matches(name, [*exclude, *default_exclude]) for name in group.producers)
    ]
