"""The generated dense convolution against torch's in float64: all vector widths, sizes, strides, borders, epilogues."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, ISAS, relative_error, same
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.gemm_call import Cut, cut_of, gemm_call, pack_gemm
from tersenet.kernels.host import host


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    activation: str = "none",
    padding: tuple[int, int] = (0, 0),
    isa: str | None = None,
    threads: int = 1,
    cut: Cut | None = None,
    out: Tensor | None = None,
) -> Tensor:
    packed = pack_gemm(weight, bias, isa)
    sizes = (tuple(x.shape), x.stride(), residual is not None)
    settings = (packed.kernel, stride, padding, packed.out_channels, activation, threads, cut)
    call = gemm_call(packed.algorithm, *sizes, *settings)
    return call.run(x, packed.tables, residual, out)


def case(
    seed: int, n: int, c: int, h: int, w: int, k: int, kernel: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    size = math.sqrt(c * math.prod(kernel))
    return x, torch.randn(k, c, *kernel, generator=generator) / size, torch.randn(k, generator=generator)


@settings(max_examples=120, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    k=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example("avx512", 2, 600, 9, 9, 300, (1, 1), (1, 1), (0, 0), "relu", True, True, 0)  # many channels, several blocks
@example("avx512", 1, 64, 20, 20, 64, (3, 3), (2, 2), (1, 1), "relu", True, False, 0)
@example("avx512", 1, 3, 40, 40, 64, (7, 7), (2, 2), (3, 3), "relu", True, False, 0)  # a stem
@example("sse", 1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), "none", False, False, 0)
@example("avx2", 1, 3, 40, 40, 17, (1, 1), (2, 1), (0, 0), "silu", True, True, 0)
@example("sse", 1, 2, 1, 1, 5, (3, 2), (1, 1), (7, 8), "relu6", True, True, 0)  # pixels that lie in the padding
def test_equals_torch(
    isa: str, n: int, c: int, h: int, w: int, k: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], activation: str, bias: bool, residual: bool, seed: int,
) -> None:  # fmt: skip
    h, w = (max(length, size - 2 * pad) for length, size, pad in zip((h, w), kernel, padding, strict=True))
    x, weight, b = case(seed, n, c, h, w, k, kernel)
    exact = F.conv2d(x.double(), weight.double(), b.double() if bias else None, stride, padding)
    added = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last) if residual else None
    found = run(x, weight, b if bias else None, added, stride, activation, padding, isa if isa in ISAS else None)
    expected = ACTIVATIONS[activation](exact if added is None else exact + added)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    size = F.conv2d(x.double().abs(), weight.double().abs(), b.double().abs() if bias else None, stride, padding).norm()
    assert float((found - expected).norm()) <= 5e-7 * float(size + (0 if added is None else added.norm()))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 40),
    side=st.integers(1, 16),
    k=st.integers(1, 100),
    block=st.integers(1, 80),
    step=st.integers(1, 5),
    kernel=st.sampled_from([(1, 1), (3, 2)]),
    threads=st.integers(1, 3),
)
def test_a_cut_and_threads_don_t_change_a_bit(
    n: int, c: int, side: int, k: int, block: int, step: int, kernel: tuple[int, int], threads: int
) -> None:
    x, weight, b = case(0, n, c, side + 2, side + 2, k, kernel)
    expected = run(x, weight, b, activation="relu")
    assert same(run(x, weight, b, activation="relu", threads=threads, cut=Cut(block, step)), expected)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("k", [64, 40])
def test_the_result_may_be_written_over_the_residual(activation: str, k: int) -> None:
    x, weight, b = case(1, 2, 30, 9, 9, k)
    residual = torch.randn(2, k, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = run(x, weight, b, residual.clone(), activation=activation)
    found = run(x, weight, b, residual, activation=activation, out=residual)
    assert found is residual
    assert same(found, expected)


def test_part_of_an_image_is_read_where_it_lies() -> None:
    x, weight, b = case(2, 2, 24, 10, 10, 33)
    part = x[:, 4:20, 1:9, ::2]
    assert part.stride(1) == 1
    expected = F.conv2d(part, weight[:, :16], b)
    assert relative_error(run(part, weight[:, :16], b), expected) < 1e-6
    x, weight, b = case(2, 2, 24, 10, 10, 33, (3, 3))
    part = x[:, :, 1:8, 2:]  # pixels of a row lie together
    assert relative_error(run(part, weight, b), F.conv2d(part, weight, b)) < 1e-6


def test_what_is_not_a_number_stays_so() -> None:
    x, weight, b = case(3, 1, 16, 3, 3, 32)
    x[0, 3, 1, 1] = math.nan
    found = run(x, weight, b, activation="relu6")
    assert bool(found[0, :, 1, 1].isnan().all())
    assert int(found.isnan().sum()) == 32


def test_an_empty_batch() -> None:
    x, weight, b = case(4, 1, 16, 3, 3, 32)
    assert run(x[:0], weight, b).shape == (0, 32, 3, 3)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(4, 4, 3), None, r"must be float32 and of shape \(C_out, C_in, kH, kW\)"),
        (torch.zeros(4, 4, 1, 1).double(), None, "weight .=torch.float64"),
        (torch.zeros(4, 0, 1, 1), None, "weight"),
        (torch.zeros(4, 4, 1, 1, device="meta"), None, "is on meta"),
        (torch.zeros(4, 4, 1, 1), torch.zeros(3), r"bias \(=\(3,\)\) must have one value for each of 4"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        pack_gemm(weight, bias)


@settings(deadline=None)
@given(
    pixels=st.integers(1, 10**6),
    c=st.integers(1, 5000),
    k=st.integers(1, 5000),
    threads=st.integers(1, 64),
)
def test_every_cut_is_one(pixels: int, c: int, k: int, threads: int) -> None:
    isa = host().isa()
    cut = cut_of(isa, pixels, c, k, threads, 1 << 20)
    assert 1 <= cut.block <= pixels
    assert 1 <= cut.output_step <= -(-k // isa.channels)
    blocks, steps = -(-pixels // cut.block), -(-k // isa.channels) // cut.output_step
    # There is work for at least half of the threads, where there are that many groups of pixels.
    assert 2 * blocks * steps >= min(threads, -(-pixels // isa.rows))
