"""The settings of a sensitivity analysis, checked before anything is opened."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.methods.magnitude import Magnitude

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SAMPLES = 1000
SPLITS = ("validation", "train", "test")
SCORES: tuple[str, ...] = get_args(Magnitude.model_fields["score"].annotation)
Residual = Literal["independent", "coupled"]


@dataclass(frozen=True)
class Settings:
    """Everything but model and data that decides the result.

    Args:
        rates: shares of a layer's channels that are set to zero; at least 0, below 1.
        importance: the score of `magnitude` by which the weakest channels are told.
        samples: images that every point is evaluated on, at most.
        split: `validation`, `train` or `test`; None: validation images, or training images where there are none.
        include, exclude: layers, by the patterns of `tersenet.graph.select`.
        residual: as for `magnitude`.
        batches: training batches that `taylor`, `activation` and `apoz` look at.
        seed: of the split, the choice of images, and what else is drawn.

    Raises:
        TersenetError: a value out of range.
        UnknownNameError: an importance, split or residual mode that there is not.
    """

    rates: tuple[float, ...] = RATES
    importance: str = "l1"
    samples: int = SAMPLES
    split: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    residual: Residual = "coupled"
    batches: int = 8
    seed: int = 0

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON gives it back, with lists for tuples."""
        return json.loads(json.dumps(asdict(self)))

    def __post_init__(self) -> None:
        for rate in self.rates:
            if not (math.isfinite(rate) and 0 <= rate < 1):
                raise TersenetError(f"rates (={rate}): a rate is the share of channels removed, at least 0 and below 1")
        if not self.rates:
            raise TersenetError("rates is empty; give some, such as 0.1,0.3,0.5,0.7")
        object.__setattr__(self, "rates", tuple(sorted(set(map(float, self.rates)))))
        for name in ("samples", "batches"):
            if getattr(self, name) < 1:
                raise TersenetError(f"{name} (={getattr(self, name)}) must be at least 1")
        named: dict[str, tuple[Any, tuple[str, ...]]] = {
            "importance": (self.importance, SCORES),
            "split": (self.split or SPLITS[0], SPLITS),
            "residual mode": (self.residual, get_args(Residual)),
        }
        for kind, (value, known) in named.items():
            if value not in known:
                raise UnknownNameError(kind, str(value), known, f"Known: {', '.join(known)}.")
