"""The published procedure against ours on one synthetic layer, a 3 x 3 convolution of 256 to 256 channels: that of
`benchmarks/channel_selection.py`, whose JSON has the times."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersenet.ops.importance import l1
from tersenet.ops.least_squares import channel_columns, error_curve, fit


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """It is not part of the package, and lies beside it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.channel_selection")


@pytest.mark.slow
def test_fact_21_selection_and_reconstruction_beat_the_published_procedure(bench: Any) -> None:
    problem, kept, taps = bench.problem(), bench.KEPT, bench.TAPS
    assert 0.55 < float(problem.x.eq(0).float().mean()) < 0.65
    began = time.process_time()
    own = bench.ours(problem)
    assert time.process_time() - began < 3
    theirs = bench.published(problem)
    error, their_error = problem.missed(*own), problem.missed(*theirs)
    moments = bench.moments_of(problem)
    path = bench.path_of(problem, moments)

    def fitted(channels: Tensor) -> float:
        columns = channel_columns(channels.sort().values, taps)
        found = fit(moments, columns)
        return problem.missed(columns, found.weight, found.bias)

    equal = fitted(path.kept(len(theirs[0]) // taps))
    response = l1(problem.weight.view(-1, bench.CHANNELS, taps).transpose(0, 1).flatten(1))
    strongest, first = fitted(response.argsort(descending=True)[:kept]), fitted(torch.arange(kept))
    nested, columns = fitted(path.order[:kept]), own[0]
    weight = problem.weight[:, columns]
    bare = problem.missed(columns, weight, (problem.wanted - problem.fresh[:, columns] @ weight.T).mean(0))
    print(
        f"ours {error:.4f}; published {their_error:.4f} with {len(theirs[0]) // taps}, ours with as many {equal:.4f}; "
        f"max response {strongest:.4f}, first {first:.4f}, no fit {bare:.4f}, nested order {nested:.4f}"
    )
    assert equal < their_error
    assert strongest >= 0.33
    # The fact's bound of 0.215 is for rows of a generator that the specification does not give.
    assert error < 0.72 * min(strongest, first)
    assert error < 0.9 * bare
    assert nested < 1.02 * error
    curve = error_curve(moments, path.order, taps)
    assert float(curve[kept]) == pytest.approx(fit(moments, channel_columns(path.order[:kept], taps)).error, rel=1e-3)
