"""Choosing half of a layer's input channels and fitting it to them: the published procedure against ours.

    OMP_NUM_THREADS=2 python -m benchmarks.channel_selection

One synthetic 3 x 3 convolution of 256 to 256 channels. Activations are behind a ReLU, sparse, smooth and mixed from far
fewer latent maps than channels, as in trained networks; 10 positions of 500 images are fitted to, 2,000 rows of others
measure. Published: scikit-learn's Lasso on a twentieth of the rows, its penalty doubled and then halved until 128 to
140 channels are left, and LinearRegression on all rows, in float64 as the published program keeps its features. Ours:
second moments of all rows, the exact path, Cholesky, at the number of channels that the published search came to. Both
alternate, on one thread and on all that torch has; each runs twice, and the second run is timed. Writes
channel_selection.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Lasso, LinearRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from tersenet.environment import environment
from tersenet.ops.contributions import contributions
from tersenet.ops.gram import Moments
from tersenet.ops.lasso_path import LassoPath, lasso_path
from tersenet.ops.least_squares import channel_columns, fit
from tersenet.ops.rows import conv_rows, draw_positions

CHANNELS, LATENTS, SIZE, TAPS, KEPT = 256, 96, 28, 9, 128
SHAPE = (CHANNELS, CHANNELS, 3, 3)
SEARCHED = 20  # the published search looks at one row of so many


@dataclass(frozen=True)
class Problem:
    """`weight` (O, C * 9); `x` (N, C * 9) and `y` (N, O) to fit to, `fresh` and `wanted` to measure on.

    All float32. The published program keeps its features in float64 (`x64`, `y64`); the conversion is not in its time.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    fresh: Tensor
    wanted: Tensor
    x64: Tensor
    y64: Tensor

    def missed(self, columns: Tensor, weight: Tensor, bias: Tensor) -> float:
        """Relative root-mean-square error on rows that no fit has seen."""
        rest = self.wanted - self.fresh[:, columns] @ weight.T.to(self.fresh) - bias.to(self.fresh)
        return float(rest.norm() / (self.wanted - self.wanted.mean(0)).norm())


Fitted = tuple[Tensor, Tensor, Tensor]
"""Columns, weight and bias."""


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(CHANNELS, LATENTS, generator=generator) / LATENTS**0.5
    gains = (0.5 * torch.randn(CHANNELS, generator=generator)).exp()
    # Channels that show the same latent map are read alike, as training makes it.
    shared = torch.einsum("olt,cl->oct", torch.randn(CHANNELS, LATENTS, TAPS, generator=generator), mixing)
    weight = 3 * shared / shared.std() + 0.5 * torch.randn(CHANNELS, CHANNELS, TAPS, generator=generator)
    weight *= (0.3 * torch.randn(CHANNELS, 1, generator=generator)).exp()
    weight = weight.flatten(1) / (CHANNELS * TAPS) ** 0.5
    x, fresh = (_sampled(images, mixing, gains, generator) for images in (500, 200))
    y = x @ weight.T
    return Problem(weight, x, y, fresh, fresh @ weight.T, x.double(), y.double())


def _sampled(images: int, mixing: Tensor, gains: Tensor, generator: torch.Generator) -> Tensor:
    """(images * 10, C * 9) rows at 10 random positions of each image; 60 % of all activations are 0."""
    found: list[Tensor] = []
    for _ in range(images // 50):
        latent = F.avg_pool2d(torch.randn(50, LATENTS, SIZE + 4, SIZE + 4, generator=generator), 5, 1) * 5
        maps = torch.einsum("cl,blhw->bchw", mixing, latent) + 0.2 * torch.randn(
            50, CHANNELS, SIZE, SIZE, generator=generator
        )
        active = (maps - 0.25 * maps.std()).relu() * gains[:, None, None]
        found.append(conv_rows(active, (3, 3), draw_positions(50, SIZE * SIZE, 10, generator), padding=(1, 1)))
    return torch.cat(found)


def published(given: Problem, seed: int = 0) -> Fitted:
    """Section 3.1 as the published code does it."""
    kept = torch.from_numpy(_bracketed(given, np.random.default_rng(seed)))
    columns = channel_columns(kept, TAPS)
    found = LinearRegression().fit(given.x64[:, columns].numpy(), given.y64.numpy())
    return columns, torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)


def _bracketed(given: Problem, generator: np.random.Generator) -> NDArray[np.int64]:
    """Double the penalty until too few channels are left, then halve the interval."""
    rows = generator.integers(0, len(given.x), min(400, len(given.x) // SEARCHED))
    parts = given.weight.double().view(-1, CHANNELS, TAPS)
    design = torch.einsum("nca,oca->noc", given.x64[rows].view(-1, CHANNELS, TAPS), parts)
    z, target = design.reshape(-1, CHANNELS).numpy(), given.y64[rows].flatten().numpy()
    seed = int(generator.integers(1 << 31))
    solver = Lasso(alpha=1e-3, warm_start=True, selection="random", tol=1e-4, random_state=seed)

    def support(alpha: float) -> NDArray[np.int64]:
        solver.alpha = alpha
        return np.flatnonzero(solver.fit(z, target).coef_)

    left, right = 0.0, 1e-3
    while len(support(right)) >= KEPT:
        right *= 2
    for _ in range(40):
        middle = (left + right) / 2
        kept = support(middle)
        if KEPT <= len(kept) <= 1.1 * KEPT:
            return kept
        left, right = (middle, right) if len(kept) > KEPT else (left, middle)
    raise AssertionError("the published search has not ended")


def moments_of(given: Problem) -> Moments:
    moments = Moments("layer", CHANNELS * TAPS, CHANNELS)
    for start in range(0, len(given.x), 500):
        moments.add(given.x[start : start + 500], given.y[start : start + 500])
    return moments


def path_of(given: Problem, moments: Moments) -> LassoPath:
    return lasso_path(contributions(moments, given.weight.view(SHAPE)))


def ours(given: Problem, count: int = KEPT) -> Fitted:
    moments = moments_of(given)
    columns = channel_columns(path_of(given, moments).kept(count), TAPS)
    found = fit(moments, columns, prior=given.weight[:, columns])
    return columns, found.weight, found.bias


def timed(work: Callable[[], Fitted]) -> tuple[Fitted, float]:
    """The result, and seconds of the second run: the first finds what the other procedure's libraries have left."""
    work()
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    given = problem()
    every = torch.get_num_threads()
    result = {
        "claim": "selection and reconstruction of one layer: seconds and held-out error",
        "runs_each": runs,
        "environment": environment("cpu"),
        "command": f"OMP_NUM_THREADS={every} python -m benchmarks.channel_selection --runs {runs}",
        "threads": [compared(given, runs, threads) for threads in sorted({1, every})],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def compared(given: Problem, runs: int, threads: int) -> dict[str, Any]:
    """Both procedures in turns, on so many threads."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    with threadpool_limits(threads):  # numpy's and scikit-learn's
        ours(given)  # the first one pays for loading the libraries
        for seed in range(runs):
            theirs, their_seconds = timed(lambda seed=seed: published(given, seed))
            channels = len(theirs[0]) // TAPS
            own, seconds = timed(lambda count=channels: ours(given, count))
            row = {"seed": seed, "channels": channels, "published_seconds": their_seconds, "our_seconds": seconds}
            rows.append(row | {"published_error": given.missed(*theirs), "our_error": given.missed(*own)})
            print(json.dumps({"threads": threads} | rows[-1]), flush=True)
    return {
        "threads": threads,
        "times_faster": median(row["published_seconds"] for row in rows) / median(row["our_seconds"] for row in rows),
        "largest_error_ratio": max(row["our_error"] / row["published_error"] for row in rows),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
