"""The dense convolution on AMX's tiles against torch's in float64: sizes, strides, borders, epilogues, precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, relative_error, same
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.amx_call import amx_call, cut_of, pack_amx
from tersenet.kernels.gemm_call import Cut
from tersenet.kernels.host import AMX, Host, host
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import pack, pack_domain
from tersenet.kernels.plan import Plan
from tersenet.kernels.winograd import Tables
from tersenet.kernels.winograd import run as winograd_run

Pair = tuple[int, int]

needs_amx = pytest.mark.skipif(host().amx_problem is not None, reason=f"AMX: {host().amx_problem}")
# L2 error relative to the convolution of absolute values: each factor is 2^-18 from its two parts, and the product of
# the low parts, at most 2^-18 of the whole, is left out.
ERROR = 3 * 2**-18


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = (1, 1),
    activation: str = "none",
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    threads: int = 1,
    cut: Cut | None = None,
    out: Tensor | None = None,
) -> Tensor:
    packed = pack_amx(weight, bias, stride, dilation, groups)
    moves = (packed.plane, dilation, groups, packed.kernel, stride, padding)
    call = amx_call(packed.algorithm, tuple(x.shape), x.stride(), *moves, len(weight), activation, threads, cut)
    return call.run(x, packed.tables, residual, out)


def case(seed: int, n: int, c: int, h: int, w: int, k: int, kernel: Pair = (1, 1)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    size = math.sqrt(c * math.prod(kernel))
    return x, torch.randn(k, c, *kernel, generator=generator) / size, torch.randn(k, generator=generator)


@needs_amx
@settings(max_examples=120, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 100),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    k=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(2, 600, 9, 9, 300, (1, 1), (1, 1), (0, 0), (1, 1), "relu", True, True, 0)  # many channels, several blocks
@example(1, 64, 20, 20, 64, (3, 3), (1, 1), (1, 1), (1, 1), "relu", True, True, 0)
@example(1, 64, 20, 20, 64, (3, 3), (2, 2), (1, 1), (1, 1), "relu", True, False, 0)
@example(1, 3, 40, 40, 64, (7, 7), (2, 2), (3, 3), (1, 1), "relu", True, False, 0)  # a stem
@example(1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), "none", False, False, 0)
@example(1, 32, 16, 16, 16, (3, 3), (1, 1), (2, 2), (2, 2), "silu", True, True, 0)
def test_equals_torch(
    n: int, c: int, h: int, w: int, k: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, activation: str,
    bias: bool, residual: bool, seed: int,
) -> None:  # fmt: skip
    if max(stride) > 1:
        dilation = (1, 1)
    reach = [apart * (size - 1) + 1 for apart, size in zip(dilation, kernel, strict=True)]
    h, w = (max(length, size - 2 * pad) for length, size, pad in zip((h, w), reach, padding, strict=True))
    x, weight, b = case(seed, n, c, h, w, k, kernel)
    moves = (stride, padding, dilation)
    exact = F.conv2d(x.double(), weight.double(), b.double() if bias else None, *moves)
    added = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last) if residual else None
    found = run(x, weight, b if bias else None, added, stride, activation, padding, dilation)
    expected = ACTIVATIONS[activation](exact if added is None else exact + added)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    size = F.conv2d(x.double().abs(), weight.double().abs(), b.double().abs() if bias else None, *moves).norm()
    assert float((found - expected).norm()) <= ERROR * float(size + (0 if added is None else added.norm()))


@needs_amx
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2),
    groups=st.integers(1, 5),
    c=st.integers(1, 70),
    k=st.integers(1, 70),
    side=st.integers(3, 12),
    size=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    threads=st.integers(1, 2),
)
@example(1, 4, 64, 64, 14, 3, 1, 2)
def test_groups_of_channels(
    n: int, groups: int, c: int, k: int, side: int, size: int, stride: int, threads: int
) -> None:
    stride = 1 if size == 3 else stride
    x, weight, b = case(7, n, groups * c, side, side, groups * k, (size, size))
    weight = weight[:, :c]
    pads = (size // 2, size // 2)
    moves = ((stride, stride), pads, (1, 1), groups)
    expected = F.conv2d(x.double(), weight.double(), b.double(), *moves).relu()
    found = run(x, weight, b, None, (stride, stride), "relu", pads, groups=groups, threads=threads)
    size_of = F.conv2d(x.double().abs(), weight.double().abs(), b.double().abs(), *moves).norm()
    assert float((found - expected).norm()) <= ERROR * float(size_of)


@needs_amx
@pytest.mark.parametrize("channels", [64, 512])
def test_more_exact_than_the_limit_of_f2(channels: int) -> None:
    """On activations as they are, relative to the result itself."""
    x, weight, b = case(5, 1, channels, 14, 14, 128, (3, 3))
    expected = F.conv2d(x.double(), weight.double(), b.double(), padding=1)
    assert relative_error(run(x, weight, b, padding=(1, 1)), expected) < 5e-6


@needs_amx
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 70),
    side=st.integers(1, 16),
    k=st.integers(1, 100),
    block=st.integers(1, 5),
    step=st.integers(1, 5),
    kernel=st.sampled_from([(1, 1), (3, 2)]),
    stride=st.sampled_from([(1, 1), (2, 1)]),
    threads=st.integers(1, 3),
)
def test_a_cut_and_threads_don_t_change_a_bit(
    n: int, c: int, side: int, k: int, block: int, step: int, kernel: Pair, stride: Pair, threads: int
) -> None:
    x, weight, b = case(0, n, c, side + 2, side + 2, k, kernel)
    settings = {"stride": stride, "activation": "relu", "padding": (1, 0)}
    expected = run(x, weight, b, **settings)  # pyright: ignore
    found = run(x, weight, b, threads=threads, cut=Cut(32 * block, step), **settings)  # pyright: ignore
    assert same(found, expected)


@needs_amx
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("k", [64, 40])
def test_the_result_may_be_written_over_the_residual(activation: str, k: int) -> None:
    x, weight, b = case(1, 2, 30, 9, 9, k)
    residual = torch.randn(2, k, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = run(x, weight, b, residual.clone(), activation=activation)
    found = run(x, weight, b, residual, activation=activation, out=residual)
    assert found is residual
    assert same(found, expected)


@needs_amx
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_part_of_an_image_is_read_where_it_lies(stride: Pair) -> None:
    x, weight, b = case(2, 2, 72, 10, 10, 33)
    part = x[:, 4:68, 1:9, ::2]
    assert part.stride(1) == 1
    expected = F.conv2d(part, weight[:, :64], b, stride)
    assert relative_error(run(part, weight[:, :64], b, stride=stride), expected) < 1e-5
    x, weight, b = case(2, 2, 24, 10, 10, 33, (3, 3))
    part = x[:, :, 1:8, 2:]  # pixels of a row lie together
    assert relative_error(run(part, weight, b, stride=stride), F.conv2d(part, weight, b, stride)) < 1e-5


@needs_amx
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_has_no_parts_becomes_nan_where_it_is_read(value: float, stride: int) -> None:
    x, weight, b = case(12, 1, 40, 7, 7, 33, (3, 3))
    clean = run(x, weight, b, stride=(stride, stride), padding=(1, 1))
    x[0, 3, 2, 4] = value
    found = run(x, weight, b, stride=(stride, stride), padding=(1, 1))
    there = torch.zeros(7, 7, dtype=torch.bool)
    there[2, 4] = True
    read = F.conv2d(there.float()[None, None], torch.ones(1, 1, 3, 3), stride=stride, padding=1)[0, 0] > 0
    assert bool(found[0, :, read].isnan().all())
    assert same(found[0, :, ~read], clean[0, :, ~read])


@needs_amx
def test_what_is_not_a_number_stays_so_and_where_it_is() -> None:
    x, weight, b = case(3, 1, 64, 3, 3, 32)
    x[0, 3, 1, 1] = math.nan
    found = run(x, weight, b, activation="relu6")
    assert bool(found[0, :, 1, 1].isnan().all())
    assert int(found.isnan().sum()) == 32
    # What an earlier call left in the scratch memory reaches no result.
    x[0, 3, 1, 1] = 0
    assert not bool(run(x[:, :, :2], weight, b).isnan().any())


@needs_amx
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_small_and_large_numbers(scale: float) -> None:
    x, weight, _ = case(6, 1, 64, 5, 5, 32)
    assert relative_error(run(x * scale, weight), F.conv2d(x.double() * scale, weight.double())) < 5e-6


@needs_amx
@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_a_bias_of_another_type_is_converted(kind: torch.dtype) -> None:
    x, weight, b = case(11, 1, 32, 5, 5, 40)
    b = b.to(kind)
    assert relative_error(run(x, weight, b), F.conv2d(x, weight, b.float())) < 1e-5


@needs_amx
def test_an_empty_batch() -> None:
    x, weight, b = case(4, 1, 16, 3, 3, 32)
    assert run(x[:0], weight, b).shape == (0, 32, 3, 3)


@needs_amx
@pytest.mark.parametrize(
    ("weight", "bias", "dilation", "message"),
    [
        (torch.zeros(4, 4, 3), None, 1, r"must be float32 and of shape \(C_out, C_in, kH, kW\)"),
        (torch.zeros(4, 4, 1, 1).double(), None, 1, "weight .=torch.float64"),
        (torch.zeros(4, 0, 1, 1), None, 1, "weight"),
        (torch.zeros(4, 4, 1, 1, device="meta"), None, 1, "is on meta"),
        (torch.zeros(4, 4, 1, 1), torch.zeros(3), 1, r"bias \(=\(3,\)\) must have one value for each of 4"),
        (torch.zeros(4, 4, 3, 3), None, 2, "with a stride .* can have no dilation"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, bias: Tensor | None, dilation: int, message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        pack_amx(weight, bias, (2, 2), (dilation, dilation))


@settings(deadline=None)
@given(
    pixels=st.integers(1, 10**6),
    halo=st.integers(0, 10**4),
    floats=st.integers(32, 50000),
    weights=st.integers(32, 500000),
    blocks=st.integers(1, 200),
    threads=st.integers(1, 64),
)
@example(131072, 4102, 64, 576, 2, 1)  # 3x3 on an image 2048 wide
def test_every_cut_is_one(pixels: int, halo: int, floats: int, weights: int, blocks: int, threads: int) -> None:
    cut = cut_of(pixels, halo, floats, weights, blocks, threads, 2 << 20)
    assert cut.block % 32 == 0
    assert 0 < cut.block < pixels + 32
    assert 1 <= cut.output_step <= blocks
    # Wide images and large dilations: what is copied for other blocks' pixels is not many times the image.
    if threads == 1:
        assert -(-pixels // cut.block) * halo <= 2 * (pixels + 32) + halo
    # There is work for at least half of the threads, where there are that many groups of pixels or blocks of outputs.
    units = -(-pixels // cut.block) * -(-blocks // cut.output_step)
    assert 2 * units >= min(threads, max(blocks, -(-pixels // 32)))


# The same for Winograd's transforms, which enlarge it.
WINOGRAD_ERRORS = {2: 1e-5, 4: 6e-5, 6: 2e-4}
# Of one part: rounded to 8 bits before the products.
ROUNDED_ERRORS = {2: 1e-2, 4: 6e-2, 6: 0.3}


@needs_amx
@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([2, 4, 6]),
    n=st.integers(1, 3),
    c=st.integers(1, 70),
    h=st.integers(3, 20),
    w=st.integers(3, 20),
    k=st.integers(1, 70),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    residual=st.booleans(),
    block=st.integers(1, 70),
    shared=st.booleans(),
    step=st.integers(1, 3),
    threads=st.integers(1, 2),
    kept=st.sampled_from(["parts", "bfloat16"]),
)
@example(4, 1, 64, 56, 56, 64, (1, 1), "relu", True, 32, False, 2, 1, "parts")
@example(2, 1, 512, 7, 7, 512, (1, 1), "none", False, 16, True, 4, 2, "parts")
@example(2, 1, 512, 7, 7, 512, (1, 1), "none", False, 16, True, 4, 2, "bfloat16")
def test_winograd_in_parts(
    m: int, n: int, c: int, h: int, w: int, k: int, padding: Pair, activation: str, residual: bool, block: int,
    shared: bool, step: int, threads: int, kept: str,
) -> None:  # fmt: skip
    x, weight, b = case(8, n, c, h, w, k, (3, 3))
    packed = pack(weight, b, m, kept=kept)
    exact = F.conv2d(x.double(), weight.double(), b.double(), padding=padding)
    added = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last) if residual else None
    found = winograd_conv2d(x, packed, padding, added, activation)
    expected = ACTIVATIONS[activation](exact if added is None else exact + added)
    size = F.conv2d(x.double().abs(), weight.double().abs(), b.double().abs(), padding=padding).norm()
    assert float((found - expected).norm()) <= (WINOGRAD_ERRORS if kept == "parts" else ROUNDED_ERRORS)[m] * float(size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        tables, cut = Tables(packed.weight, packed.bias), Plan(block, shared, step, 1)
        assert same(winograd_run(x, tables, added, padding, k, packed.algorithm, activation, cut), found)
    finally:
        torch.set_num_threads(before)


@needs_amx
@pytest.mark.parametrize(
    ("m", "kept", "least", "most"), [(2, "parts", 1e-6, 1e-5), (4, "parts", 5e-6, 1e-4), (2, "bfloat16", 1e-3, 6e-3)]
)
def test_error_of_winograd_in_parts(m: int, kept: str, least: float, most: float) -> None:
    """Within what is asked of these kernels, relative to the result itself."""
    x, weight, b = case(9, 1, 128, 28, 28, 128, (3, 3))
    expected = F.conv2d(x.relu().double(), weight.double(), b.double(), padding=1)
    assert least < relative_error(winograd_conv2d(x.relu(), pack(weight, b, m, kept=kept), (1, 1)), expected) < most


@needs_amx
def test_the_winograd_domain_with_its_relu() -> None:
    weight, x = torch.randn(36, 40, 50, dtype=torch.float64), torch.randn(2, 40, 13, 9)
    found = [
        winograd_conv2d(x, pack_domain(weight, None, 4, relu=True, kept=kept), (1, 1)) for kept in ("float", "parts")
    ]
    assert relative_error(found[1], found[0]) < 6e-5


def test_a_processor_without_tiles_says_so() -> None:
    old = Host("skylake", frozenset(AMX.needs) - {"amx-bf16"}, "x86", 1 << 20)
    with pytest.raises(TersenetError, match=r"this processor \(skylake\) has none for bfloat16; `gemm` is the kernel"):
        old.amx()
    with pytest.raises(TersenetError, match="has none for bfloat16"):
        Host("m1", frozenset(), "arm", 1 << 20).amx()


def test_a_system_that_does_not_permit_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersenet.kernels.host._permitted", lambda: False)
    with pytest.raises(TersenetError, match="the system does not let this process use them"):
        Host("some", frozenset(AMX.needs), "x86", 1 << 20).amx()
