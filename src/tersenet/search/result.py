"""What a sensitivity analysis found: accuracy against pruning rate, layer by layer, and the rates that follow from it.

Units: rates and shares are fractions in 0..1, MACs are counts for one sample.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tersenet.errors import TersenetError
from tersenet.results import Accuracy

FORMAT = 1
Score = Literal["top1", "metric", "loss"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Point(_Record):
    """One channel group without its weakest channels, everything else whole."""

    rate: float
    removed: int = Field(description="channels set to zero")
    macs: int = Field(description="of the whole network without these channels")
    accuracy: Accuracy | None = Field(description="none where the loss or the metric was not finite")


class LayerCurve(_Record):
    """One channel group. `producers` are the layers that make its channels: they can only be pruned together."""

    name: str
    producers: list[str]
    channels: int
    macs_share: float = Field(description="of the network's MACs, those in layers that make or read these channels")
    points: list[Point] = Field(description="by increasing rate")


class Sensitivity(_Record):
    """The whole analysis. `skipped` has the groups that were not looked at, by reason."""

    format: int = FORMAT
    tersenet: str
    model: str
    data: str
    split: str
    settings: dict[str, Any]
    macs: int
    baseline: Accuracy
    layers: list[LayerCurve]
    skipped: dict[str, list[str]]
    notes: list[str] = Field(default_factory=list)
    environment: dict[str, Any]
    command: str | None = None

    @property
    def score(self) -> Score:
        """What is compared: top-1, the user's own metric (higher is better) where there is none, or else the loss."""
        if self.baseline.top1 is not None:
            return "top1"
        return "metric" if self.baseline.metric is not None else "loss"

    def value(self, accuracy: Accuracy) -> float:
        """The compared figure."""
        found = getattr(accuracy, self.score)
        if found is None:
            raise TersenetError(f"there is no {self.score} for every sample, so that nothing can be compared")
        return float(found)

    def drop(self, point: Point) -> float:
        """What a point loses: top-1 (a fraction) or metric less than the whole network's, or loss more than it.
        Everything, infinity, where that was not finite."""
        if point.accuracy is None:
            return math.inf
        lost = self.value(self.baseline) - self.value(point.accuracy)
        return -lost if self.score == "loss" else lost

    def rates(self, max_drop: float = 0.01) -> dict[str, float]:
        """The largest measured rate of each layer up to which it alone loses at most `max_drop`; 0 where there is none.

        In the form of the `rates` of `magnitude` and `soft_filter_pruning`. Each rate was measured with all other
        layers whole: together they lose more than `max_drop`.

        Args:
            max_drop: 0.01 is one point of top-1; in units of the metric or the loss where there is no top-1.

        Raises:
            TersenetError: a `max_drop` that is negative or not a number.
        """
        if not max_drop >= 0:
            raise TersenetError(f"max_drop (={max_drop}) must be at least 0; 0.01 is one point of top-1")
        own = {layer.name: self.layer_rate(layer, max_drop) for layer in self.layers}
        # A pattern stands for every group that one of its layers makes channels of; it gets what all of them can bear.
        keys = dict.fromkeys(layer.producers[0] for layer in self.layers)
        return {key: min(own[layer.name] for layer in self.layers if key in layer.producers) for key in keys}

    def layer_rate(self, layer: LayerCurve, max_drop: float) -> float:
        """The largest rate of one layer up to which no measured one loses more than `max_drop`; 0 for none."""
        rate = 0.0
        for point in layer.points:
            # In floating point, 0.93 - 0.92 is more than 0.01.
            if self.drop(point) > max_drop + 1e-9:
                break
            rate = point.rate
        return rate
