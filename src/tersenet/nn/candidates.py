"""A convolution that can be computed in several ways, while it is decided which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Choice = tuple[tuple[int, Tensor | None], ...]
"""(place, weight) of every way that runs; a weight of None is 1."""


class CandidateConv2d(nn.Module):
    """forward(x): what `paths[i](x)` gives for the chosen i, or the weighted sum of several.

    paths: modules for one and the same input; they may share parameters.
    chosen, best: what runs in training and in evaluation.
    observing: all run, so that their quantizers see what comes in; the first one's output goes on.
    """

    def __init__(self, paths: Sequence[nn.Module]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)
        self.chosen: Choice = ((0, None),)
        self.best: Choice = ((0, None),)
        self.observing = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.observing:
            first, *_ = [path(*args, **kwargs) for path in self.paths]
            return first
        total: Tensor | None = None
        for place, weight in self.chosen if self.training else self.best:
            y = self.paths[place](*args, **kwargs)
            y = y if weight is None else y * weight
            total = y if total is None else total + y
        assert total is not None
        return total
