"""Times on a GPU, by its own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch

from tersenet.measuring.turns import called_in_turns

_ROUNDS = 9
_chosen: dict[Hashable, str] = {}


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds between events before and behind what `run` puts on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def fastest(key: Hashable, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the fastest of `ways`: measured once in a process for each key, in turns, after a pass that compiles.

    While a CUDA graph is captured nothing can be measured: then it is the first, unless the key is known.
    """
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return next(iter(ways))
        for run in ways.values():
            run()
        found = called_in_turns({name: partial(timed, run) for name, run in ways.items()}, _ROUNDS)
        _chosen[key] = min(found, key=lambda name: statistics.median(found[name]))
    return _chosen[key]
