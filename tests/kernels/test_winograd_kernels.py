"""The generated convolution against torch's in float64: all vector widths, sizes, borders, epilogues and layouts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, ERRORS, ISAS, exact, relative_error, same
from torch import Tensor

from tersenet.kernels.generate import OUTPUTS
from tersenet.kernels.host import host
from tersenet.kernels.layout import layout
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import Packed, pack
from tersenet.kernels.plan import Plan
from tersenet.kernels.winograd import Tables, run


def case(seed: int, n: int, c: int, h: int, w: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(k, c, 3, 3, generator=generator) / math.sqrt(9 * c), torch.randn(k, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    m=st.sampled_from(OUTPUTS),
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    k=st.integers(1, 70),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example("avx512", 4, 1, 300, 14, 14, 40, (1, 1), "relu", True, True, 0)  # sliced input channels
@example("avx512", 6, 2, 16, 60, 60, 32, (1, 1), "none", True, False, 0)  # many blocks
@example("sse", 4, 1, 1, 1, 1, 1, (1, 1), "none", False, False, 0)
@example("avx2", 6, 1, 2, 1, 1, 3, (9, 9), "silu", True, True, 0)  # tiles that lie in the padding
def test_equals_torch(
    isa: str, m: int, n: int, c: int, h: int, w: int, k: int, padding: tuple[int, int], activation: str,
    bias: bool, residual: bool, seed: int,
) -> None:  # fmt: skip
    h, w = max(h, 3 - 2 * padding[0]), max(w, 3 - 2 * padding[1])
    x, weight, b = case(seed, n, c, h, w, k)
    added = torch.randn(n, k, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2) if residual else None
    packed = pack(weight, b if bias else None, m, isa if isa in ISAS else None)
    y = winograd_conv2d(x, packed, padding, added, activation)
    reference = exact(x, weight, b if bias else None, padding, added, activation)
    assert y.shape == reference.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Of what was added up: a small output may be the difference of large products.
    scale = exact(x.abs(), weight.abs(), b.abs() if bias else None, padding, None if added is None else added.abs())
    assert float((y - reference).norm()) <= ERRORS[m] * float(scale.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "worst"), [(2, 5e-7), (4, 4e-6), (6, 8e-6)])
def test_error_of_a_layer(isa: str, m: int, worst: float) -> None:
    """64 channels at 30x30: F2 as good as direct convolution, F4 and F6 a digit worse."""
    x, weight, bias = case(1, 1, 64, 30, 30, 64)
    error = relative_error(winograd_conv2d(x, pack(weight, bias, m, isa), (1, 1)), exact(x, weight, bias, (1, 1)))
    assert worst / 100 < error < worst


@pytest.mark.parametrize("isa", [isa.name for isa in host().isas() if isa.has_half])
@pytest.mark.parametrize(("m", "worst"), [(2, 1e-3), (4, 6e-3), (6, 1.2e-2)])
def test_error_with_half_weights(isa: str, m: int, worst: float) -> None:
    """Channels of very different size lose no more than others; sums are those of float32."""
    x, weight, bias = case(1, 1, 40, 20, 20, 50)
    weight *= torch.logspace(-6, 3, 50)[:, None, None, None]
    packed = pack(weight, None, m, isa, kept="half")
    assert packed.weight.dtype == torch.float16
    y, reference = winograd_conv2d(x, packed, (1, 1)), exact(x, weight, None, (1, 1))
    errors = [relative_error(y[:, k], reference[:, k]) for k in range(50)]
    assert worst / 100 < max(errors) < worst
    expected = exact(x, weight, bias, (1, 1), None, "silu")
    full = relative_error(winograd_conv2d(x, pack(weight, bias, m, isa, kept="half"), (1, 1), None, "silu"), expected)
    assert full < worst


@pytest.mark.parametrize("isa", ISAS)
def test_every_cut_gives_the_same_bits(isa: str) -> None:
    """Blocks of any number of tiles, shared or private, sliced or not: only the order of work differs."""
    x, weight, bias = case(2, 2, 37, 13, 11, 45)
    packed = pack(weight, bias, 4, isa)
    cuts = [Plan(*cut) for cut in itertools.product((1, 5, 24), (False, True), (1, 2, 9), (1, 3, 10))]
    found = [cut_run(x, packed, cut) for cut in cuts]
    assert relative_error(found[0], exact(x, weight, bias, (1, 1))) < ERRORS[4]
    assert all(same(found[0], y) for y in found[1:])


def cut_run(x: Tensor, packed: Packed, cut: Plan) -> Tensor:
    return run(x, Tables(packed.weight, packed.bias), None, (1, 1), packed.out_channels, packed.algorithm, "none", cut)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    n, c, h, w = x.shape
    wide = torch.full((n, h + 2, w + 3, c + 5), math.nan).permute(0, 3, 1, 2)
    slices = wide[:, 2 : 2 + c, 1 : 1 + h, 1 : 1 + w]
    slices.copy_(x)
    return {"channels first": x.contiguous(), "slice": slices, "transposed": x.transpose(2, 3).clone().transpose(2, 3)}


@pytest.mark.parametrize("kind", ["channels first", "slice", "transposed"])
def test_layouts_of_input_and_residual(kind: str) -> None:
    x, weight, bias = case(3, 2, 19, 9, 7, 19)
    residual = torch.randn(2, 19, 9, 7).contiguous(memory_format=torch.channels_last)
    packed = pack(weight, bias, 4)
    expected = winograd_conv2d(x, packed, (1, 1), residual, "relu")
    found = winograd_conv2d(strided(x)[kind], packed, (1, 1), strided(residual)[kind], "relu")
    assert same(found, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_large_values_and_what_is_not_a_number(isa: str, activation: str) -> None:
    """Epilogues meet extreme values through the bias: no overflow inside SiLU, and NaN stays NaN."""
    bias = torch.tensor([1e30, -1e30, 100.0, -100.0, 90.0, -88.0, 0.0, -0.0, 6.0, 1e-30, -20.0, math.nan, 3e38])
    packed = pack(torch.zeros(len(bias), 5, 3, 3), bias, 2, isa)
    y = winograd_conv2d(torch.randn(1, 5, 6, 6), packed, (0, 0), None, activation)
    expected = ACTIVATIONS[activation](bias.double()).float()[:, None, None].expand_as(y[0])
    torch.testing.assert_close(y[0], expected, rtol=2e-6, atol=1e-30 if activation != "silu" else 2e-36, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_silu_is_exact_to_the_last_digits(isa: str) -> None:
    bias = torch.linspace(-30, 30, 4001)
    y = winograd_conv2d(torch.zeros(1, 1, 3, 3), pack(torch.zeros(4001, 1, 3, 3), bias, 2, isa), activation="silu")
    expected = torch.nn.functional.silu(bias.double())
    assert float(((y.flatten() - expected) / expected.abs().clamp_min(1e-9)).abs().max()) < 5e-7


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_outside_is_read_or_written(isa: str) -> None:
    """NaN around the input and the residual does not come in; neighbours of a channel slice are not needed."""
    x, weight, bias = case(5, 1, 21, 8, 10, 21)
    packed = pack(weight, bias, 6, isa)
    y = winograd_conv2d(strided(x)["slice"], packed, (1, 1), strided(x)["slice"])
    assert relative_error(y, exact(x, weight, bias, (1, 1), x)) < ERRORS[6]


def test_an_empty_batch_and_no_output_channels_left_over() -> None:
    packed = pack(torch.randn(8, 4, 3, 3))
    assert winograd_conv2d(torch.empty(0, 4, 8, 8), packed, (1, 1)).shape == (0, 8, 8, 8)


def test_other_defaults_of_torch_do_not_matter() -> None:
    x, weight, bias = case(6, 1, 8, 6, 6, 8)
    expected = winograd_conv2d(x, pack(weight, bias), (1, 1))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert same(winograd_conv2d(x, pack(weight, bias), (1, 1)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_packed_weight_that_is_not_aligned() -> None:
    """A memory-mapped file puts tensors anywhere."""
    x, weight, bias = case(7, 1, 33, 9, 9, 33)
    packed = pack(weight, bias)
    moved = [torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t) for t in (packed.weight, packed.bias)]
    arguments: list[Any] = [None, (1, 1), 33, packed.algorithm, "none"]
    assert same(run(x, Tables(*moved), *arguments), winograd_conv2d(x, packed, (1, 1)))


def test_scratch_does_not_grow_with_the_input() -> None:
    """Private blocks take what fits the cache, whatever the size of the image."""
    packed = pack(torch.randn(64, 64, 3, 3))
    small, large = (layout(packed.algorithm, (1, 64, size, size), (1, 1), 64, 1) for size in (64, 512))
    assert not large.shared
    assert large.thread_floats == small.thread_floats < 2**20
