"""What a run reports: typed, per layer and per step. The table, the JSON and the HTML page read only this.

Units: MACs and parameters are counts, sizes are bytes, times are milliseconds, accuracies are fractions in 0..1.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

REPORT_FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Latency(_Record):
    """Wall time of one forward pass: median and quartiles over `runs` runs."""

    median_ms: float
    low_ms: float = Field(description="first quartile")
    high_ms: float = Field(description="third quartile")
    runs: int
    batch: int
    threads: int
    device: str = "cpu"


class Accuracy(_Record):
    """Share of right answers among `n` samples, with the 95 % Wilson interval of the top-1 share."""

    n: int
    loss: float | None = None
    top1: float | None = None
    top5: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    correct: int | None = Field(default=None, description="top-1 count, exact")
    metric: float | None = Field(default=None, description="mean of the user's own metric, if one was given")


class Measures(_Record):
    """One network, measured. None means: not measured."""

    params: int
    macs: int
    bytes: int
    top1: float | None = None
    top5: float | None = None
    n_eval: int | None = None
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    uncounted: list[str] = Field(default_factory=list, description="operators that the MAC count could not price")


class LayerRow(_Record):
    """One convolution or linear layer before and after."""

    name: str
    kind: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    note: str = ""


class Equality(_Record):
    """How far the compact network's outputs are from the masked one's on the same inputs."""

    max_abs: float
    relative: float = Field(description="max_abs divided by the largest absolute output")
    tolerance: float
    samples: int
    response: float | None = Field(
        default=None, description="how far outputs of two noise inputs are apart, divided by the largest; if known"
    )

    @property
    def telling(self) -> bool:
        """Whether the outputs depend on the input enough for their equality to prove something."""
        return self.response is None or self.response >= 1e-3

    @property
    def remark(self) -> str:
        """What a reader has to know beside the numbers."""
        return "" if self.telling else " The outputs hardly depend on the input, so this says little: is it trained?"


class LayerFit(_Record):
    """One layer fitted to calibration data. Errors are root mean squares, as shares of the deviation of what is wanted:
    0 is no error, 1 that of a constant."""

    name: str
    what: str = Field(default="inputs", description="what the layer lost: inputs, or rank")
    before: int
    after: int
    unfitted: float | None = Field(default=None, description="error of its responses without the fit")
    error: float | None = Field(default=None, description="error of its responses; None: it was not fitted")
    output_error: float | None = Field(default=None, description="error of the network's output at this point")


class GroupMap(_Record):
    """A layer's kernel norms in the order of its channels at one time of training, and its groups then."""

    name: str
    epoch: int = Field(description="epochs trained by then")
    groups: int = Field(ge=1)
    kept: float = Field(description="share of the norm that lies inside the groups")
    cells: list[Annotated[str, Field(pattern="^[0-9a-f]{1,16}$")]] = Field(
        min_length=1,
        max_length=16,
        description="the matrix, output channels by input channels, at most 16 cells each way: a text per row, a "
        "hexadecimal digit per cell, f for the largest mean norm",
    )


class StepResult(_Record):
    """One step of the recipe. `curves` has one row per epoch, its keys name the columns."""

    index: int
    method: str
    settings: dict[str, Any]
    seconds: float
    after: Measures
    equality: Equality | None = None
    masked: Accuracy | None = Field(default=None, description="accuracy with the zeros still in, before compaction")
    curves: list[dict[str, Any]] = Field(default_factory=list)
    fits: list[LayerFit] = Field(default_factory=list, description="in the order in which they were made")
    maps: list[GroupMap] = Field(default_factory=list, description="of learned groups, by time and layer")
    notes: list[str] = Field(default_factory=list)


class Report(_Record):
    """A whole run. `before` is the network as it came to the first step that compresses, `after` the final one."""

    format: int = REPORT_FORMAT
    tersenet: str
    model: str
    recipe: dict[str, Any]
    data: str
    target: str | None = None
    steps: list[StepResult]
    before: Measures
    after: Measures
    layers: list[LayerRow]
    notes: list[str] = Field(default_factory=list)
    environment: dict[str, Any]
    command: str | None = None
