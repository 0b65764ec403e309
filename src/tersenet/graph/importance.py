"""One score per unit of a channel group, by what is known of the layers that the unit lies in.

A unit lies in several places: the filters of every layer that makes it, several filters of one layer, batch norms, the
layers that read it. Each function here scores the channels of those ends that its criterion is about;
`unit_scores` then takes the Euclidean norm over all of a unit's places. For `l2` that is the norm of all weights that
make the unit.

Source: Fang et al., DepGraph, CVPR 2023 (a group's importance is the sum of squared norms over its members).
Differs: only the layers that make a channel count, not those that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.labels import End
from tersenet.graph.model import ModelGraph
from tersenet.graph.trace import evaluating
from tersenet.graph.units import ChannelGroup
from tersenet.ops.importance import taylor

EndScores = dict[int, Tensor]
"""Number of an end -> one score per index along the end's axis."""


def unit_scores(group: ChannelGroup, ends: EndScores) -> Tensor:
    """(size,) Euclidean norm, over all places of a unit in `ends`, of the scores there.

    Raises:
        GraphError: scores that are not finite, or no end of this group among `ends`.
    """
    parts = [ends[m.end][torch.from_numpy(m.places).to(ends[m.end].device)] for m in group.members if m.end in ends]
    if not parts:
        raise GraphError(
            f"{group.name}: nothing was seen of its channels, so they have no score; use l2, or exclude it"
        )
    scores = torch.cat(parts, dim=1).square().sum(1).sqrt()
    if not bool(scores.isfinite().all()):
        raise GraphError(
            f"{group.name}: the scores of its channels are not finite (NaN or infinite). Check the weights of "
            f"{', '.join(group.producers)}"
        )
    return scores


@torch.no_grad()
def filter_scores(graph: ModelGraph, groups: Iterable[ChannelGroup], score: Callable[[Tensor], Tensor]) -> EndScores:
    """`score` of the filters, as rows of a (C, K) matrix, of every layer that makes channels of these groups."""
    return {index: score(_rows(_filters(graph, end), end)) for index, end in _ends(graph, groups, "produce").items()}


def random_scores(graph: ModelGraph, groups: Iterable[ChannelGroup], seed: int) -> EndScores:
    """Uniform noise: the control that every other score must beat."""
    generator = torch.Generator().manual_seed(seed)
    ends = _ends(graph, groups, "produce")
    return {index: torch.rand(len(end.labels), generator=generator) for index, end in ends.items()}


def batch_norm_scales(graph: ModelGraph, groups: Iterable[ChannelGroup]) -> EndScores:
    """|gamma| of every batch norm that these groups go through.

    Raises:
        GraphError: a group without a batch norm that has scales.

    Source: Liu et al., Network Slimming, ICCV 2017.
    """
    found: EndScores = {}
    for group in groups:
        norms = {index: gamma for index, end in _ends(graph, [group], "pass").items() if (gamma := _gamma(graph, end))}
        if not norms:
            raise GraphError(f"score: bn_scale needs a batch norm behind {group.name}, which has none; use l2")
        found |= {index: graph.tensor(gamma).detach().abs() for index, gamma in norms.items()}
    return found


def taylor_scores(graph: ModelGraph, groups: Iterable[ChannelGroup], losses: Iterable[Tensor]) -> EndScores:
    """`ops.importance.taylor` of every layer that makes channels of these groups, as the mean over `losses`.

    Args:
        losses: scalars, each computed from `graph.model` when it is asked for.
    """
    ends = _ends(graph, groups, "produce")
    weights = [_weight(graph, end) for end in ends.values()]
    totals = [torch.zeros(len(end.labels), device=w.device) for w, end in zip(weights, ends.values(), strict=True)]
    count = 0
    with evaluating(graph.model), torch.enable_grad(), _trainable(weights):
        for loss in losses:
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            for total, weight, gradient, end in zip(totals, weights, gradients, ends.values(), strict=True):
                total += taylor(_rows(weight, end), _rows(gradient, end))
            count += 1
    return {index: total / max(count, 1) for index, total in zip(ends, totals, strict=True)}


def activation_scores(
    graph: ModelGraph,
    groups: Iterable[ChannelGroup],
    losses: Iterable[Tensor],
    statistic: Callable[[Tensor], Tensor],
) -> EndScores:
    """`statistic` of the (C, M) values that every layer reads of these groups' channels, as the mean over all calls.

    What a layer reads is behind batch norm and activation, where a channel's size and zeros mean something.

    Args:
        losses: as for `taylor_scores`; only the forward passes count.
    """
    totals: EndScores = {}
    samples: dict[int, int] = {}

    def watch(index: int, end: End, inputs: Tensor) -> None:
        # A convolution reads (N, C, ...), a linear layer (..., C).
        values = inputs.movedim(1 if _weight(graph, end).dim() > 2 else -1, 0).flatten(1)
        if end.reads is None or len(values) != len(end.reads):
            return  # a module that does more before it reads
        scores = statistic(values.float()) * len(inputs)
        # Of a grouped convolution the end's axis is one group long, and the channels at one place go together.
        totals[index] = totals.get(index, 0) + scores.reshape(-1, len(end.labels)).mean(0)
        samples[index] = samples.get(index, 0) + len(inputs)

    with ExitStack() as stack:
        stack.enter_context(evaluating(graph.model))
        stack.enter_context(torch.no_grad())
        for index, end in _ends(graph, groups, "consume").items():
            layer = graph.model.get_submodule(end.layer)

            def hook(_: nn.Module, args: Any, kwargs: Any, index: int = index, end: End = end) -> None:
                watch(index, end, next(iter([*args, *kwargs.values()])))

            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for _ in losses:
            pass
    return {index: total / samples[index] for index, total in totals.items()}


def _ends(graph: ModelGraph, groups: Iterable[ChannelGroup], role: str) -> dict[int, End]:
    numbers = sorted({member.end for group in groups for member in group.members})
    return {number: graph.ends[number] for number in numbers if graph.ends[number].role == role}


def _weight(graph: ModelGraph, end: End) -> Tensor:
    return graph.tensor(end.tensors[0])


def _filters(graph: ModelGraph, end: End) -> Tensor:
    """The weight as the layer uses it: `torch.nn.utils.prune` keeps it as `weight_orig` times `weight_mask`."""
    owner, _, leaf = end.tensors[0].rpartition(".")
    original = getattr(graph.model.get_submodule(owner), f"{leaf.removesuffix('_mask')}_orig", None)
    weight = _weight(graph, end)
    return weight * original if leaf.endswith("_mask") and isinstance(original, Tensor) else weight


def _rows(weight: Tensor, end: End) -> Tensor:
    """(C, K): one filter per row."""
    return weight.detach().movedim(end.axis, 0).flatten(1).float()


def _gamma(graph: ModelGraph, end: End) -> str | None:
    is_norm = any(name == "num_features" for _, name in end.attributes)
    return next((name for name in end.tensors if is_norm and name.endswith(".weight")), None)


@contextmanager
def _trainable(weights: Sequence[Tensor]) -> Generator[None]:
    """Gradients for weights that the user may have frozen."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
