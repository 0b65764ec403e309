"""Convolutions in 8-bit integers against the quantized layers that they stand for, stage by stage in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, same
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.gemm_call import Cut
from tersenet.kernels.host import Host, host
from tersenet.kernels.int8 import Int8, int8_isa, usable_isas
from tersenet.kernels.int8_call import int8_call
from tersenet.kernels.int8_pack import MOST_PRODUCTS, Integers, Level, Moves, pack_int8
from tersenet.lowering.integers import IntegerLayer
from tersenet.nn.quantized_operator import QuantizedConvolution
from tersenet.ops.cook_toom import cook_toom
from tersenet.ops.winograd import kronecker

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]

ISAS = [isa.name for isa in usable_isas()]
needs_bytes = pytest.mark.skipif(not ISAS, reason="this processor has no instructions for products of bytes")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(seed: int, *shape: int, bits: int = 8) -> Tensor:
    bound = 2 ** (bits - 1)
    return torch.randint(-bound, bound, shape, generator=generator(seed), dtype=torch.int8)


def powers(seed: int, *shape: int, low: int = -8, high: int = -6) -> Tensor:
    """Scales with which every step is exact."""
    return torch.exp2(torch.randint(low, high + 1, shape, generator=generator(seed)).float())


def image(seed: int, n: int, c: int, h: int, w: int, size: float = 1.0) -> Tensor:
    x = size * torch.randn(n, c, h, w, generator=generator(seed))
    return x.contiguous(memory_format=torch.channels_last)


def direct(
    seed: int, c: int, k: int, kernel: Pair, stride: Pair = (1, 1), padding: Pads = (0, 0, 0, 0),
    dilation: Pair = (1, 1), bits: int = 8, output: int | None = 8, scale: Tensor | None = None,
) -> QuantizedConvolution:  # fmt: skip
    own = powers(seed + 1, k, 1, 1, 1, low=-9) if scale is None else scale
    size = math.sqrt(c * math.prod(kernel))
    step = torch.tensor(2.0 ** round(math.log2(size))) / (2**bits)
    return QuantizedConvolution(
        levels(seed, k, c, *kernel, bits=bits),
        own,
        powers(seed + 2, k) - 0.0039,
        powers(seed + 3, k, low=-1, high=1),
        powers(seed + 4, k),
        input=torch.tensor(2.0 ** (2 - bits)),
        output=None if output is None else step,
        bits=[bits, 0, 0, output or 0, bits],
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def winograd(
    seed: int, c: int, k: int, m: int, padding: Pads = (1, 1, 1, 1), bits: int = 8, product: int | None = 8,
    output: int | None = 8, points: str = "lavin", per: str = "tap", exact: bool = True,
) -> QuantizedConvolution:  # fmt: skip
    """With scales of the size that values have, powers of two if all is to be `exact`."""
    made = cook_toom(m, 3, points)
    at, bt = (torch.tensor([[float(x) for x in row] for row in matrix]) for matrix in (made.at, made.bt))
    taps = len(bt) ** 2
    spread = kronecker(bt).norm(dim=1).view(taps, 1, 1, 1)
    top = 2.0 ** (bits - 1)
    shape = (taps, 1, 1, k) if per == "tap_channel" else (taps, 1, 1, 1)

    def settled(scale: Tensor) -> Tensor:
        return torch.exp2(scale.log2().round()) if exact else scale

    of_input = settled(torch.tensor(3.3) / top)
    of_v = settled(3.1 * spread / top)
    of_u = settled(torch.rand(shape, generator=generator(seed + 1)) + 0.5) / 64
    of_m = settled(2.9 * spread * of_u * top * math.sqrt(c) / 2 ** ((product or 8) - 1))
    if exact:  # of tensors that are summed up: one scale, so that float32 has all of the sum
        of_m = of_m.median() * torch.ones(taps, 1, 1, 1)
    step = settled((of_m.mean() * 2.0 ** ((product or 8) - 1) * m) / 2 ** ((output or 8) - 1))
    return QuantizedConvolution(
        levels(seed, taps, 1, c, k, bits=bits),
        of_u,
        powers(seed + 2, k),
        powers(seed + 3, k, low=-1, high=1),
        powers(seed + 4, k),
        input=of_input,
        transformed=of_v,
        product=None if product is None else of_m,
        output=None if output is None else step,
        aa=kronecker(at),
        bb=kronecker(bt),
        bits=[bits, bits, product or 0, output or 0, bits],
        at=at.flatten().tolist(),
        bt=bt.flatten().tolist(),
        kernel=(3, 3),
        padding=padding,
    )


def run(
    layer: QuantizedConvolution, x: Tensor, isa: str | None = None, residual: Tensor | None = None,
    activation: str = "none", threads: int = 1, cut: Cut | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    described = IntegerLayer("", layer, residual is not None, activation)
    packed = pack_int8(described.integers, described.moves, isa)
    call = int8_call(packed, x.shape, x.stride(), activation, threads, cut)
    return call.run(x, packed.tables, residual, out)


@needs_bytes
@settings(max_examples=50, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    n=st.integers(1, 3),
    c=st.integers(1, 140),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    k=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bits=st.integers(2, 8),
    output=st.sampled_from([None, 4, 8, 16]),
    activation=st.sampled_from(["none", "relu", "relu6"]),
    residual=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example("", 2, 300, 9, 9, 130, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 8, 8, "relu", True, 0)
@example("", 1, 64, 20, 20, 64, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 8, 8, "relu", False, 0)
@example("", 1, 1, 1, 1, 1, (1, 1), (3, 3), (0, 0, 0, 0), (1, 1), 8, 8, "none", False, 0)
def test_a_direct_convolution_is_exact(
    isa: str, n: int, c: int, h: int, w: int, k: int, kernel: Pair, stride: Pair, padding: Pads, dilation: Pair,
    bits: int, output: int | None, activation: str, residual: bool, seed: int,
) -> None:  # fmt: skip
    """With scales that are powers of two, to the last bit."""
    reach = [apart * (size - 1) + 1 for apart, size in zip(dilation, kernel, strict=True)]
    h, w = max(h, reach[0] - sum(padding[:2])), max(w, reach[1] - sum(padding[2:]))
    layer = direct(seed, c, k, kernel, stride, padding, dilation, bits, output)
    x = image(seed, n, c, h, w)
    expected = layer.double().compute(x.double())
    added = image(seed + 9, *expected.shape) if residual else None
    expected = ACTIVATIONS[activation](expected if added is None else expected.float() + added)
    found = run(layer, x, isa or None, added, activation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if output is None:
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-6, atol=1e-6)
    else:
        assert torch.equal(found.double(), expected.double())


@needs_bytes
@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    n=st.integers(1, 3),
    c=st.integers(1, 140),
    h=st.integers(1, 11),
    w=st.integers(1, 11),
    k=st.integers(1, 70),
    m=st.sampled_from([2, 4]),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    bits=st.integers(2, 8),
    product=st.sampled_from([8, 10]),
    per=st.sampled_from(["tap", "tap_channel"]),
    activation=st.sampled_from(["none", "relu"]),
    residual=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example("", 2, 300, 9, 9, 130, 4, (1, 1, 1, 1), 8, 8, "tap", "relu", True, 0)
@example("", 1, 1, 1, 1, 1, 4, (1, 1, 1, 1), 8, 8, "tap", "none", False, 0)
def test_winograd_is_exact(
    isa: str, n: int, c: int, h: int, w: int, k: int, m: int, padding: Pads, bits: int, product: int, per: str,
    activation: str, residual: bool, seed: int,
) -> None:  # fmt: skip
    """With scales that are powers of two and points that are whole numbers, to the last bit."""
    h, w = max(h, 3 - sum(padding[:2])), max(w, 3 - sum(padding[2:]))
    layer = winograd(seed, c, k, m, padding, bits, product, per=per)
    x = image(seed, n, c, h, w)
    expected = layer.double().compute(x.double())
    added = image(seed + 9, *expected.shape) if residual else None
    expected = ACTIVATIONS[activation](expected if added is None else expected.float() + added)
    assert torch.equal(run(layer, x, isa or None, added, activation).double(), expected.double())


@needs_bytes
@pytest.mark.parametrize("points", ["balanced", "lavin"])
@pytest.mark.parametrize(("m", "product", "output"), [(2, 8, 8), (4, 8, 8), (4, None, None), (6, 10, 8), (6, 16, 16)])
def test_any_scales_and_points(m: int, product: int | None, output: int | None, points: str) -> None:
    """Against float64, which breaks ties otherwise: next to all levels are the same."""
    layer = winograd(0, 70, 40, m, product=product, output=output, points=points, exact=False)
    x = image(1, 2, 70, 15, 13)
    expected = layer.double().compute(x.double())
    found = run(layer, x)
    assert float(expected.std()) > 0.1
    if output == 8:
        assert layer.output is not None
        assert layer.factor is not None
        apart = ((found - expected) / (layer.output * layer.factor.view(-1, 1, 1))).abs()
        # A level of V on the other side of a tie moves all outputs of its tile, those of F6 most.
        assert float((apart > 0.5).float().mean()) < (0.05 if m == 6 else 0.005)
    assert float((found - expected).norm() / expected.norm()) < 1e-2


@needs_bytes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [0, 4])
@pytest.mark.parametrize("c", [16, 80, 128])
def test_levels_in_and_out_are_those_that_would_be_made(isa: str, m: int, c: int) -> None:
    layer = winograd(0, c, 48, m, exact=False) if m else direct(0, c, 48, (3, 3), (2, 1), (1, 1, 0, 2))
    x, residual = image(1, 2, c, 15, 13), image(2, *layer.output_size((2, c, 15, 13)))
    y = run(layer, x, isa, residual, "relu")
    described = IntegerLayer("", layer, True, "relu")
    packed = pack_int8(described.integers, described.moves, isa)
    given = (0.37 * float(y.std()) / 127 * 6, -100, 101)
    scale, least, most = packed.input
    made = (x / scale).round().clamp(least, most).to(torch.int8)
    assert made.stride() == x.stride()
    for one in (x, made, made[..., 1:]):
        call = int8_call(packed, one.shape, one.stride(), "relu", 1, taken=one is not x, given=given)
        r = residual if one.shape == x.shape else residual[:, :, :, 1:].contiguous(memory_format=torch.channels_last)
        found = call.run(one, packed.tables, r)
        wanted = y if one.shape == x.shape else run(layer, x[..., 1:], isa, r, "relu")
        assert found.dtype == torch.int8
        assert torch.equal(found, (wanted / torch.tensor(given[0])).round().clamp(*given[1:]).to(torch.int8))
    call = int8_call(packed, made.shape, made.stride(), "relu", 1, taken=True)
    assert same(call.run(made, packed.tables, residual), y)


@needs_bytes
def test_every_processor_gives_the_same_bits() -> None:
    for layer in (direct(0, 70, 40, (3, 3), padding=(1, 1, 1, 1)), winograd(0, 70, 40, 4, exact=False)):
        x = image(1, 2, 70, 15, 13)
        first, *others = (run(layer, x, isa) for isa in ISAS)
        assert all(same(first, other) for other in others)


@needs_bytes
@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    n=st.integers(1, 2),
    c=st.integers(1, 140),
    side=st.integers(1, 20),
    k=st.integers(1, 140),
    m=st.sampled_from([0, 2, 4]),
    block=st.integers(1, 5),
    step=st.integers(1, 5),
    threads=st.integers(1, 3),
)
def test_a_cut_and_threads_don_t_change_a_bit(
    isa: str, n: int, c: int, side: int, k: int, m: int, block: int, step: int, threads: int
) -> None:
    pads = (1, 1, 1, 1)
    layer = winograd(0, c, k, m, exact=False) if m else direct(0, c, k, (3, 3), padding=pads)
    x = image(0, n, c, side, side)
    expected = run(layer, x, isa)
    assert same(run(layer, x, isa, threads=threads), expected)
    assert same(run(layer, x, isa, threads=threads, cut=Cut(42 * block if m else 224 * block, step)), expected)


@needs_bytes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [0, 4])
def test_levels_end_where_they_end(isa: str, m: int) -> None:
    """Numbers far beyond the last level, and infinities, count as that level, on both sides."""
    layer = winograd(0, 40, 33, m) if m else direct(0, 40, 33, (3, 3), padding=(1, 1, 1, 1))
    x = image(3, 1, 40, 9, 9, size=1e3)
    x[0, :, 3] = math.inf
    x[0, :5, 4] = -math.inf
    x[0, :, 5] = 3e38
    expected = layer.double().compute(x.double())
    assert torch.equal(run(layer, x, isa).double(), expected)
    assert layer.input is not None
    ends = torch.tensor([-128, 127]) * layer.input
    assert torch.equal(run(layer, x.clamp(*ends.tolist()), isa), run(layer, x, isa))


@needs_bytes
def test_ties_of_the_input_go_to_the_even_level() -> None:
    layer = direct(0, 64, 8, (1, 1), output=None)
    assert layer.input is not None
    x = (torch.arange(64 * 4).view(1, 64, 2, 2) - 128 + 0.5) * layer.input
    assert torch.equal(run(layer, x.contiguous(memory_format=torch.channels_last)), layer.compute(x))


@needs_bytes
@settings(max_examples=60, deadline=None)
@given(scale=st.floats(2**-26, 2**12, width=32), seed=st.integers(0, 2**32))
def test_levels_of_the_input_are_those_of_a_division(scale: float, seed: int) -> None:
    """Of numbers within some last digits of a tie as well."""
    step = torch.tensor(scale)
    ties = (torch.randint(-128, 127, (64, 64), generator=generator(seed)) + 0.5) * step
    x = torch.nextafter(ties, ties + torch.randint(-1, 2, (64, 64), generator=generator(seed + 1)))
    x = x.view(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    one = torch.ones(1, 1, 1, 1)
    eye = torch.eye(64, dtype=torch.int8).view(64, 64, 1, 1)
    layer = replace(direct(0, 64, 64, (1, 1), output=None), weight=eye, scale=one, bias=None, factor=None, summand=None)
    layer = replace(layer, input=step)
    wanted = (x / step).round().clamp(-128, 127)
    assert torch.equal((run(layer, x) / step).round(), wanted)


@needs_bytes
def test_what_is_not_a_number_reaches_no_pixel_that_does_not_read_it() -> None:
    layer = direct(0, 40, 33, (3, 3), padding=(1, 1, 1, 1))
    x = image(5, 1, 40, 7, 7)
    clean = run(layer, x)
    x[0, 3, 1, 1] = math.nan
    found = run(layer, x)
    assert same(found[..., 3:], clean[..., 3:])
    assert bool(found.isfinite().all())


@needs_bytes
@pytest.mark.parametrize("m", [0, 4])
def test_the_result_may_be_written_over_the_residual(m: int) -> None:
    layer = winograd(0, 40, 33, m) if m else direct(0, 40, 33, (3, 3), padding=(1, 1, 1, 1))
    x, residual = image(1, 2, 40, 9, 9), image(2, 2, 33, 9, 9)
    expected = run(layer, x, residual=residual.clone(), activation="relu")
    found = run(layer, x, residual=residual, activation="relu", out=residual)
    assert found is residual
    assert same(found, expected)


@needs_bytes
def test_part_of_an_image_is_read_where_it_lies() -> None:
    layer = direct(0, 40, 33, (3, 3))
    part = image(1, 2, 48, 12, 12)[:, 4:44, 1:11, ::2]
    assert torch.equal(run(layer, part), run(layer, part.contiguous(memory_format=torch.channels_last)))


@needs_bytes
def test_an_empty_batch() -> None:
    assert run(direct(0, 40, 33, (3, 3)), image(0, 1, 40, 5, 5)[:0]).shape == (0, 33, 3, 3)


def test_what_cannot_be_packed() -> None:
    one = Level(torch.tensor(1.0), -128, 127)

    def packed(weight: Tensor) -> None:
        pack_int8(Integers(weight, torch.ones(1, 1), None, None, None, one, None), Moves((1, 1)))

    with pytest.raises(TersenetError, match=r"weight \(=torch.int16\) must be int8" if ISAS else "no convolutions"):
        packed(torch.ones(1, 4, 4, dtype=torch.int16))
    with pytest.raises(TersenetError, match="may not fit into 32 bits" if ISAS else "no convolutions"):
        packed(torch.ones(1, MOST_PRODUCTS + 1, 1, dtype=torch.int8))


def test_processors_without_products_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TersenetError, match="no convolutions in 8-bit integers on nothing"):
        int8_isa("nothing")
    plain = Host("old", host().features - {"avx512vnni", "avxvnni", "amx-int8"}, "x86", 1 << 20)
    monkeypatch.setattr("tersenet.kernels.int8.host", lambda: plain)
    assert usable_isas() == ()
    with pytest.raises(TersenetError, match=r"no convolutions in 8-bit integers on this processor \(old\).*torch's"):
        int8_isa()


@needs_bytes
def test_names_tell_all_code_apart() -> None:
    made = [cook_toom(m, 3, points) for m in (2, 4) for points in ("lavin", "balanced")]
    half = tuple(tuple(x / 2 for x in row) for row in made[0].bt)
    isa = usable_isas()[0]
    kinds = {(t.at, t.bt) for t in made} | {(made[0].at, half)}  # two names of F2 are one
    codes = {Int8(isa, *kind, *flags) for kind in kinds for flags in ((False, False), (True, False), (True, True))}
    codes |= {Int8(isa), Int8(isa, output=True)}
    assert len({code.name for code in codes}) == len(codes)
    assert half[0][0] == Fraction(1, 2)
