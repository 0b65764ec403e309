"""Settings of a Winograd layer: tile, points, what may be trained, what is quantized. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Bits = Annotated[int, Field(ge=2, le=32)]
Flex = Literal["static", "full", "diagonal", "points"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Quantizer(_Settings):
    """How one tensor of the layer is fake-quantized."""

    bits: Bits
    """2 to 32."""
    per: Literal["tensor", "tap", "tap_channel", "channel"] = "tensor"
    """What has a scale of its own: the tensor, each of the t * t taps, or each tap and channel: of the input for the
    transformed input, of the output for the transformed weight and product. `channel`: each filter of the weight."""
    scale: Literal["range", "learned"] = "range"
    """`range`: of the moving range of the values. `learned`: trained, from the first batch's range."""
    power_of_two: bool = False
    """Scales are powers of two, so that rescaling is a shift."""
    momentum: float = Field(default=0.01, gt=0, le=1)
    """Share of a new batch in the moving range."""
    clip_gradient: bool = False
    """No gradient for values beyond the last level; with learned scales always. The reference passes it everywhere."""


class Quantization(_Settings):
    """The quantizers of a layer, each with bits of its own; None leaves the tensor as it is."""

    input: Quantizer | None = None
    """The layer's input."""
    weight: Quantizer | None = None
    """The layer's weight."""
    input_winograd: Quantizer | None = None
    """B^T d B of every tile."""
    weight_winograd: Quantizer | None = None
    """G g G^T."""
    product: Quantizer | None = None
    """The sum of products over the input channels, one of each tap."""
    output: Quantizer | None = None
    """The layer's output."""
    transforms: Quantizer | None = None
    """A^T, G and B^T, each with one scale."""

    @classmethod
    def reference(cls, bits: int) -> Self:
        """The reference's: nine quantizers, one scale each. Source: MLSys 2020, arXiv 2002.10711."""
        one = Quantizer(bits=bits)
        return cls(**dict.fromkeys(cls.model_fields, one))

    @classmethod
    def tapwise(cls, bits: int, product_bits: int | None = None, power_of_two: bool = False) -> Self:
        """One scale per tap in the Winograd domain, exact transforms: a 47th of the reference's error for F(4, 3).

        Source: Andri et al., Going Further With Winograd Convolutions: Tap-Wise Quantization, arXiv 2209.12982.
        """
        tap = Quantizer(bits=bits, per="tap", power_of_two=power_of_two)
        return cls(
            input=Quantizer(bits=bits),
            weight=Quantizer(bits=bits),
            input_winograd=tap,
            weight_winograd=tap,
            product=tap.model_copy(update={"bits": product_bits or bits}),
            output=Quantizer(bits=bits),
        )


def _listed(points: object) -> object:
    return tuple(str(point) for point in points) if isinstance(points, list | tuple) else points


# Short ones: settings are read from files of strangers too, and 1e999999999 is a number that fills the memory.
Point = Annotated[str, Field(max_length=12, pattern=r"^-?[0-9]+(/[0-9]*[1-9][0-9]*|\.[0-9]+)?$")]
Points = Annotated[
    Annotated[str, Field(max_length=32)] | Annotated[tuple[Point, ...], Field(max_length=24)], BeforeValidator(_listed)
]


class WinogradSettings(_Settings):
    """F(m, r), and how the layer may change it."""

    tile: int = Field(default=4, ge=1, le=8)
    """m: outputs of a tile along each axis."""
    points: Points = "balanced"
    """A named point set (`tersenet winograd info F4`), or the m + r - 2 finite points as fractions."""
    flex: Flex = "static"
    """`static`: the transforms stay. `full`: A, B and G are trained freely (the paper); the layer stops being a
    convolution. `diagonal`: only the scales of the taps are trained, `points`: only the points; both stay exact."""
    quantization: Quantization | None = None
    """None computes in floating point."""
