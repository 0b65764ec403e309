"""The bfloat16 convolution on AMX's tiles against float64 of rounded numbers: sizes, borders, types, cuts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, same
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.bf16_call import Blocks, Types, bf16_call, blocks_of, dense, pack_bf16
from tersenet.kernels.host import host
from tersenet.kernels.pool_call import NO_TABLES, Windows, pool_call

Pair = tuple[int, int]

needs_amx = pytest.mark.skipif(host().amx_problem is not None, reason=f"AMX: {host().amx_problem}")
HALF = torch.bfloat16
ROUNDING = 2**-8  # of a bfloat16 number, at most


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "none",
    half: bool = False,
    threads: int = 1,
    cut: Blocks | None = None,
    out: Tensor | None = None,
) -> Tensor:
    packed = pack_bf16(weight, bias, stride, dilation, groups)
    types = Types(x.dtype == HALF, half, residual is not None and residual.dtype == HALF)
    moves = (packed.kernel, stride, padding, dilation)
    what = (types, packed.interleaved, groups, *moves, len(weight), activation, threads, cut)
    return bf16_call(packed.algorithm, tuple(x.shape), x.stride(), *what).run(x, packed.tables, residual, out)


def noise(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@needs_amx
@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 100),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    k=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    types=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, False, True])),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
@example(1, 64, 20, 20, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, "relu", True, (True, True, True), 1, 0)
@example(2, 3, 40, 40, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1, "relu", True, (False, True, None), 2, 0)  # a stem
@example(2, 64, 9, 9, 300, (1, 1), (1, 1), (0, 0), (1, 1), 1, "relu", True, (True, True, None), 1, 0)  # no copy
@example(2, 64, 9, 9, 70, (1, 1), (2, 2), (0, 0), (1, 1), 1, "none", True, (True, False, None), 1, 0)
@example(3, 512, 7, 7, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, "relu", True, (True, True, True), 1, 0)
@example(
    5, 600, 1, 1, 40, (1, 1), (1, 1), (0, 0), (1, 1), 1, "relu", True, (False, False, None), 1, 0
)  # a linear layer
@example(1, 32, 16, 16, 16, (3, 3), (2, 2), (2, 2), (3, 3), 2, "silu", True, (True, True, False), 1, 0)
def test_is_the_convolution_of_rounded_numbers(
    n: int, c: int, h: int, w: int, k: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    activation: str, bias: bool, types: tuple[bool, bool, bool | None], threads: int, seed: int,
) -> None:  # fmt: skip
    reach = [apart * (size - 1) + 1 for apart, size in zip(dilation, kernel, strict=True)]
    h, w = (max(length, size - 2 * pad) for length, size, pad in zip((h, w), reach, padding, strict=True))
    x, b = noise(n, groups * c, h, w, seed=seed), noise(groups * k) if bias else None
    weight = noise(groups * k, c, *kernel, seed=seed + 1) / math.sqrt(c * math.prod(kernel))
    moves = (stride, padding, dilation, groups)
    exact = F.conv2d(rounded(x), rounded(weight), None if b is None else b.double(), *moves)
    half_x, half_y, half_r = types
    added = None if half_r is None else noise(*exact.shape, seed=2).to(HALF if half_r else torch.float32)
    expected = ACTIVATIONS[activation](exact if added is None else exact + added.double())
    given = x.to(HALF) if half_x else x
    found = run(given, weight, b, added, *moves, activation, half_y, threads)
    assert found.shape == expected.shape
    assert found.dtype == (HALF if half_y else torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    terms = F.conv2d(rounded(x).abs(), rounded(weight).abs(), None if b is None else b.double().abs(), *moves).norm()
    limit = 2e-6 * float(terms + (0 if added is None else added.norm())) + half_y * ROUNDING * float(expected.norm())
    assert float((found.double() - expected).norm()) <= limit


@needs_amx
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 70),
    side=st.integers(3, 30),
    k=st.integers(1, 100),
    images=st.integers(1, 4),
    rows=st.integers(1, 5),
    step=st.integers(1, 4),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 2)]),
    stride=st.sampled_from([(1, 1), (2, 2)]),
)
def test_any_cut_and_number_of_threads_gives_the_same_bits(
    n: int, c: int, side: int, k: int, images: int, rows: int, step: int, kernel: Pair, stride: Pair
) -> None:
    x, weight, b = noise(n, c, side, side).to(HALF), noise(k, c, *kernel), noise(k)
    padding = tuple(size // 2 for size in kernel)
    moves: tuple[Pair, Pair] = (stride, (padding[0], padding[1]))
    whole = run(x, weight, b, None, *moves)
    cut = Blocks(1, rows, step) if images == 1 else Blocks(images, whole.shape[2] * n, step)
    assume(images == 1 or kernel != (1, 1))  # then images are rows of one
    cut = cut if images == 1 else Blocks(images, whole.shape[2], step)
    for threads in (1, 2):
        assert same(run(x, weight, b, None, *moves, threads=threads, cut=cut), whole)
        assert same(run(x, weight, b, None, *moves, threads=threads), whole)


@needs_amx
def test_what_memory_held_before_does_not_matter() -> None:
    """Scratch memory is full of bits that are no numbers; what tiles read of them is dropped or meets none."""
    x, weight = noise(1, 64, 30, 30), noise(64, 64, 3, 3)
    run(torch.full_like(x, math.nan), weight, padding=(1, 1))
    for channels, size, stride in ((3, 7, 2), (5, 3, 1), (33, 3, 2), (40, 1, 1)):
        x, weight = noise(1, channels, 13, 11), noise(20, channels, size, size)
        pads = (size // 2, size // 2)
        found = run(x, weight, stride=(stride, stride), padding=pads)
        expected = F.conv2d(rounded(x), rounded(weight), None, stride, pads)
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@needs_amx
def test_result_over_the_residual() -> None:
    x, weight, residual = noise(1, 64, 9, 9).to(HALF), noise(40, 64, 1, 1), noise(1, 40, 9, 9).to(HALF)
    expected = run(x, weight, None, residual, half=True)
    over = residual.clone(memory_format=torch.channels_last)
    assert run(x, weight, None, over, half=True, out=over) is over
    assert same(over, expected)


@needs_amx
def test_not_a_number_stays_in_the_outputs_that_read_it() -> None:
    x, weight = noise(1, 64, 12, 12), noise(32, 64, 3, 3)
    x[0, 5, 4, 7] = math.nan
    bad = run(x, weight, padding=(1, 1), activation="relu").isnan().any(1)[0]
    assert bad.nonzero().tolist() == [[row, column] for row in (3, 4, 5) for column in (6, 7, 8)]


@needs_amx
def test_weight_of_a_linear_layer_comes_back_rounded() -> None:
    weight = noise(70, 100)
    assert torch.equal(dense(pack_bf16(weight[:, :, None, None])), weight.bfloat16().float())


@needs_amx
@pytest.mark.parametrize(
    ("weight", "groups", "message"),
    [
        (torch.randn(4, 3, 3), 1, "weight"),
        (torch.randn(4, 3, 3, 3).double(), 1, "weight"),
        (torch.randn(4, 3, 3, 3), 3, r"groups \(=3\)"),
    ],
)
def test_what_is_no_weight_is_refused(weight: Tensor, groups: int, message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        pack_bf16(weight, groups=groups)


@needs_amx
def test_rows_of_more_numbers_than_16_bits_count_have_their_borders() -> None:
    """2100 pixels of 16 channels, which follow each other in V."""
    run(torch.full((1, 64, 8, 600), 1e6).contiguous(memory_format=torch.channels_last), torch.ones(32, 64, 3, 3))
    x, weight = noise(1, 16, 2, 2100), noise(8, 16, 3, 3, seed=1)
    assert pack_bf16(weight).interleaved
    found, expected = run(x, weight, padding=(1, 1)), F.conv2d(rounded(x), rounded(weight), padding=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(1, 40),
    rows=st.integers(1, 300),
    row_bytes=st.integers(64, 2**22),
    halo=st.integers(0, 20),
    pixels=st.integers(1, 300),
    weight_bytes=st.integers(2048, 2**26),
    outputs=st.integers(1, 64),
    threads=st.integers(1, 8),
)
def test_blocks_cover_everything_and_leave_work_for_threads(
    images: int, rows: int, row_bytes: int, halo: int, pixels: int, weight_bytes: int, outputs: int, threads: int
) -> None:
    l2 = 2**21
    cut = blocks_of(images, rows, row_bytes, halo, pixels, weight_bytes, outputs, threads, l2)
    for found, most in ((cut.images, images), (cut.rows, rows), (cut.output_step, outputs)):
        assert 1 <= found <= most
    assert cut.images == 1 or cut.rows == rows
    held = cut.images * (cut.rows + halo) * row_bytes
    assert held <= 0.4 * l2 or cut.rows <= max(1, halo)
    units = -(-images // cut.images) * -(-rows // cut.rows) * -(-outputs // cut.output_step)
    if images * rows * pixels >= 64 * threads and rows >= 2 * threads:
        assert units >= min(threads, 2)


@needs_amx
@settings(max_examples=30, deadline=None)
@given(c=st.integers(1, 140), h=st.integers(3, 14), w=st.integers(3, 14), threads=st.integers(1, 2))
def test_max_pool_of_bfloat16(c: int, h: int, w: int, threads: int) -> None:
    x = noise(2, c, h, w).to(HALF)
    x[0, 0, 1, 1] = math.nan
    call = pool_call(tuple(x.shape), x.stride(), Windows((3, 3), (2, 2), (1, 1)), threads, half=True)
    found = call.run(x, NO_TABLES, None)
    assert found.dtype == HALF
    torch.testing.assert_close(found, F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)
