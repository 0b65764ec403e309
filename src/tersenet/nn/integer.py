"""A quantized convolution in integers only: what a runtime without floating point would compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.folded import FoldedConv2d, FoldedLayer, FoldedWinogradConv2d, edges_of, fold
from tersenet.nn.levels import Levels
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.ops.fixed_point import (
    WORD,
    FixedPoint,
    Rescaling,
    bit_length,
    fixed_point,
    narrow,
    rescaling,
    shifted,
)
from tersenet.ops.winograd import assembled, kronecker, products, transformed
from tersenet.ops.winograd_tiles import Geometry, input_tiles, padded_image, weight_taps

# Of an entry of BB, and its binary places where it is no multiple of a power of two; and of an entry of AA.
_BB_BITS, _BB_PLACES, _AA_BITS = 36, 28, 24


class IntegerConv2d(FoldedLayer):
    """A `WinogradConv2d` or `QuantizedConv2d` whose numbers are all integers, from its input's levels to its output's.

    forward takes and gives floating point, as other layers need it: it rounds, calls `integers`, and scales back. In
    between every scale is an integer factor and a shift; sums are 32 bits wide where they fit, else 64.

    Its output is that of the layer in evaluation mode, or the next level where floating point rounded a tie's
    neighbourhood otherwise. It is a reference for runtimes, not a fast layer: PyTorch multiplies integers slowly, and
    on a CPU only.

    Shapes: (N, C_in, H, W) -> (N, C_out, H', W').

    Raises: TersenetError for tensors that are not quantized or have more than 16 bits, and for scales per tap and input
        channel, which can't leave the sum over the channels.
    """

    weight: Tensor
    bias: Tensor | None
    aa: Tensor
    bb: Tensor
    y_factors: Tensor

    def __init__(self, layer: WinogradConv2d | QuantizedConv2d) -> None:
        super().__init__()
        self.take(layer)
        self.edges, self.padding_mode, self.geometry = _borders(layer)
        parts = _winograd(layer) if isinstance(layer, WinogradConv2d) else _direct(layer, self.geometry)
        self.input, self.output = parts.input, parts.output
        self.input_winograd, self.product = parts.input_winograd, parts.product
        self.register_buffer("weight", parts.weight)
        bound = float(-parts.input.rounding.lowest)
        self.v_type = torch.int32
        scale = self.input.whole.double()
        self.rescale_v = self.rescale_m = None
        if parts.input_winograd is not None and parts.bb is not None:
            self.register_buffer("bb", parts.bb.values)
            bound *= float(parts.bb.values.abs().sum(1).max())
            self.v_type = narrow(bound)
            step = parts.input_winograd.whole.double()
            self.rescale_v = self._rescaling("v_factors", scale * parts.unit_b / 2.0**parts.bb.shift / step, bound)
            scale, bound = step, float(-parts.input_winograd.rounding.lowest)
        bound *= -float(torch.iinfo(parts.weight.dtype).min) * parts.weight.shape[2]
        self.m_type = narrow(bound)
        scale = scale * parts.weight_scale.double()
        if parts.product is not None:
            step = parts.product.whole.double()
            self.rescale_m = self._rescaling("m_factors", scale / step, bound)
            scale, bound = step, float(-parts.product.rounding.lowest)
        unit = parts.output.whole.double().reshape(())
        factors = scale * parts.unit_a / unit
        # The taps' scales differ a thousandfold: powers of two of them go into AA, so that all factors are near 1.
        powers = factors.flatten(1).amax(1).log2().round().exp2()
        aa = fixed_point(parts.aa * powers, _AA_BITS)
        self.register_buffer("aa", aa.values)
        spread = float(aa.values.abs().sum(1).max())
        found = fixed_point(factors / powers.view(-1, 1, 1, 1), WORD - bit_length(bound * spread))
        self.register_buffer("y_factors", found.values)
        self.y_shift = found.shift + aa.shift
        bias = layer.bias
        whole = None if bias is None else (bias.detach().double() / unit * 2.0**self.y_shift).round().to(torch.int64)
        self.register_buffer("bias", whole)

    def _rescaling(self, name: str, factors: Tensor, bound: float) -> tuple[int, str, int]:
        found = rescaling(factors, bound)
        self.register_buffer(name, found.factors)
        return found.before, name, found.after

    def _rescaled(self, sums: Tensor, by: tuple[int, str, int], levels: Levels) -> Tensor:
        before, name, after = by
        return _clamped(Rescaling(before, self.get_buffer(name), after)(sums), levels)

    def compute(self, x: Tensor) -> Tensor:
        return self.output.values(self.integers(self.input.integers(x)))

    def integers(self, x: Tensor) -> Tensor:
        """Levels of the input (N, C_in, H, W) -> levels of the output (N, C_out, H', W'), with the channels in the
        weight's own order."""
        if any(self.edges):
            x = nn.functional.pad(x.double(), self.edges, mode=self.padding_mode).to(x.dtype)
        n, _, h, w = x.shape
        at = self.geometry
        v = input_tiles(padded_image(x.to(self.v_type), at), at)
        if self.rescale_v is None or self.input_winograd is None:
            v = v.flatten(0, 1).flatten(2, 4)
        else:
            v = self._rescaled(transformed(self.bb.to(self.v_type), v), self.rescale_v, self.input_winograd)
        m = products(v.to(self.m_type), self.weight.to(self.m_type))
        if self.rescale_m is not None and self.product is not None:
            m = self._rescaled(m, self.rescale_m, self.product)
        y = assembled(self.aa, m.to(torch.int64) * self.y_factors, self.bias, at, (n, h, w), False)
        return _clamped(shifted(y, self.y_shift), self.output).to(self.output.zero.dtype)

    def extra_repr(self) -> str:
        return f"F({self.geometry.tile}, {self.geometry.taps}), weight={tuple(self.weight.shape)}"


class _Parts(NamedTuple):
    """Of a layer; matrices are integers times their unit. `weight` is (t t, groups, C', K)."""

    input: Levels
    output: Levels
    weight: Tensor
    weight_scale: Tensor
    aa: Tensor
    unit_a: float
    bb: FixedPoint | None = None
    unit_b: float = 1.0
    input_winograd: Levels | None = None
    product: Levels | None = None


def _winograd(layer: WinogradConv2d) -> _Parts:
    needed = ("input", "input_winograd", "weight_winograd", "product", "output")
    _check(layer.quantizers, needed)
    folded = fold(layer)
    assert isinstance(folded, FoldedWinogradConv2d)
    found = {name: getattr(folded, name) for name in needed}
    if found["input_winograd"].rounding.shape[3] > 1:
        raise TersenetError(
            "the transformed input has one scale per tap and input channel, which no sum over channels in integers can "
            "have: use one per tap"
        )
    matrices: dict[str, tuple[Tensor, float]] = {}
    with torch.no_grad():
        # In the type that the layer computes in: where a transform is rounded, another type would break ties otherwise.
        own = layer.transforms(torch.promote_types(layer.weight.dtype, torch.float32))
        exact = {name: matrix.double() for name, matrix in zip(("at", "g", "bt"), own, strict=True)}
    for name in ("at", "bt"):
        matrix, unit = kronecker(exact[name]), 1.0
        if layer.transforms.quantizers:
            quantizer = layer.transforms.quantizers[name]
            assert isinstance(quantizer, FakeQuantizer)
            scale = float(quantizer.stage()[1])
            matrix, unit = kronecker((exact[name] / scale).round()), scale**2
        matrices[name] = matrix, unit
    (aa, unit_a), (bb, unit_b) = matrices["at"], matrices["bt"]
    return _Parts(
        found["input"], found["output"], folded.weight, found["weight_winograd"].whole, aa, unit_a,
        fixed_point(bb, _BB_BITS, _BB_PLACES), unit_b, found["input_winograd"], found["product"],
    )  # fmt: skip


def _direct(layer: QuantizedConv2d, at: Geometry) -> _Parts:
    """As F(1, r): each tap of the filter is a product of its own, and the output their sum."""
    _check(layer.quantizers, ("input", "weight", "output"))
    folded = fold(layer)
    assert isinstance(folded, FoldedConv2d)
    assert folded.weight_levels is not None
    weight = weight_taps(folded.weight, at).flatten(0, 1)
    scale = folded.weight_levels.whole
    if scale.numel() > 1:
        scale = scale.view(1, at.groups, 1, -1)
    ones = torch.ones(1, len(weight), dtype=torch.float64, device=weight.device)
    assert isinstance(folded.input, Levels)
    assert isinstance(folded.output, Levels)
    return _Parts(folded.input, folded.output, weight, scale, ones, 1.0)


def _borders(layer: WinogradConv2d | QuantizedConv2d) -> tuple[tuple[int, ...], str, Geometry]:
    left, right, top, bottom = edges_of(layer)
    zeros = layer.padding_mode == "zeros"
    if isinstance(layer, WinogradConv2d):
        at = layer.geometry
    else:
        kernel, stride, dilation = ((v[0], v[1]) for v in (layer.kernel_size, layer.stride, layer.dilation))
        padding = ((top, bottom), (left, right)) if zeros else ((0, 0), (0, 0))
        at = Geometry(1, kernel, stride, padding, dilation, layer.groups)
    return (0, 0, 0, 0) if zeros else (left, right, top, bottom), layer.padding_mode, at


def _check(quantizers: nn.ModuleDict, needed: tuple[str, ...]) -> None:
    for name in needed:
        if name not in quantizers:
            raise TersenetError(f"its {name} is not quantized, which integers need")
        quantizer = quantizers[name]
        assert isinstance(quantizer, FakeQuantizer)
        if quantizer.rounding.bits > 16:
            raise TersenetError(f"its {name} has {quantizer.rounding.bits} bits; integers here have at most 16")


def _clamped(values: Tensor, levels: Levels) -> Tensor:
    return values.clamp_(levels.rounding.lowest, levels.rounding.highest)
