"""Settings of a convolution with its weight in the Winograd domain. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tersenet.nn.winograd_settings import Points

Init = Literal["transform", "reference", "unit"]


class WinogradReLUSettings(BaseModel):
    """What the layer computes; its sizes come from the convolution in whose place it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tile: int = Field(default=2, ge=1, le=4)
    """m of F(m, r)."""
    points: Points = "reference"
    """A named point set, or the m + r - 2 finite points; `reference` has the published F(2, 3) and Lavin's F(4, 3).
    Signs matter: the ReLU sees them."""
    relu: bool = True
    """Whether the layer has a ReLU of its own, behind the input transform. Without, it is the `native` layer."""
    threshold: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of the `native` layer: what is no further than this from zero behind the input transform becomes zero."""
