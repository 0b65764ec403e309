"""The Triton kernels against torch's convolution in float64, on the CPU: sizes, borders, epilogues, types, masks.

`test_triton.py` runs this file in a process of its own: TRITON_INTERPRET has to be set before Triton is imported.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, ERRORS, exact, relative_error, same
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.gpu import run as runs
from tersenet.kernels.gpu.host import interpreted
from tersenet.kernels.gpu.operator import gpu_winograd_conv2d
from tersenet.kernels.gpu.pack import GpuAlgorithm, GpuPacked, pack_gpu, pack_gpu_domain
from tersenet.kernels.gpu.run import Tables, run
from tersenet.lowering import on_gpu
from tersenet.lowering.layers import AnyLayer
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings

assert interpreted()


def case(seed: int, n: int, c: int, h: int, w: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(k, c, 3, 3, generator=generator) / math.sqrt(9 * c), torch.randn(k, generator=generator)


def ways(packed: GpuPacked, x: Tensor, padding: tuple[int, int]) -> dict[str, Tensor]:
    """The result of every way that there is."""
    names = ["stepwise", "library"] if x.dtype == torch.float32 else ["stepwise"]
    names += ["fused"] if packed.algorithm.m == 2 else []
    tables = Tables(packed.weight, packed.bias)
    rest = (None, padding, packed.out_channels, packed.algorithm, "none")
    return {name: run(x, tables, *rest, way=name) for name in names}


@settings(max_examples=4, deadline=None)
@given(
    m=st.sampled_from([2, 4, 6]),
    fused=st.booleans(),
    n=st.integers(1, 2),
    c=st.integers(1, 40),
    h=st.integers(1, 14),
    w=st.integers(1, 14),
    k=st.integers(1, 40),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(2, False, 2, 70, 14, 14, 80, (1, 1), "relu", True, True, 0)  # several blocks of everything
@example(2, True, 1, 70, 14, 14, 40, (1, 1), "relu", True, True, 0)
@example(4, False, 1, 1, 1, 1, 1, (1, 1), "none", False, False, 0)
@example(6, False, 1, 2, 1, 1, 3, (9, 9), "silu", True, True, 0)  # tiles that lie in the padding
def test_equals_torch(
    m: int, fused: bool, n: int, c: int, h: int, w: int, k: int, padding: tuple[int, int], activation: str,
    bias: bool, residual: bool, seed: int,
) -> None:  # fmt: skip
    h, w = max(h, 3 - 2 * padding[0]), max(w, 3 - 2 * padding[1])
    x, weight, b = case(seed, n, c, h, w, k)
    added = torch.randn(n, k, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2) if residual else None
    packed = pack_gpu(weight, b if bias else None, GpuAlgorithm(m), "cpu")
    if fused and m == 2:
        tables = Tables(packed.weight, packed.bias)
        y = run(x, tables, added, padding, k, packed.algorithm, activation, "fused")
    else:
        y = gpu_winograd_conv2d(x, packed, padding, added, activation)
    reference = exact(x, weight, b if bias else None, padding, added, activation)
    assert y.shape == reference.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Of what was added up: a small output may be the difference of large products.
    scale = exact(x.abs(), weight.abs(), b.abs() if bias else None, padding, None if added is None else added.abs())
    assert float((y - reference).norm()) <= ERRORS[m] * float(scale.norm())


@settings(max_examples=3, deadline=None)
@given(
    m=st.sampled_from([2, 4]),
    points=st.sampled_from(["reference", "lavin"]),
    relu=st.booleans(),
    c=st.integers(1, 40),
    side=st.integers(1, 12),
    k=st.integers(1, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    residual=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
@example(4, "reference", True, 70, 13, 40, "relu", True, 0.4, 0)
def test_pruned_and_dense_weights_of_the_domain_equal_the_layer(
    m: int, points: str, relu: bool, c: int, side: int, k: int, activation: str, residual: bool, density: float,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(c, k, 3, padding=1, dtype=torch.float64)
    layer = WinogradReLUConv2d.from_conv(conv, WinogradReLUSettings(tile=m, points=points, relu=relu)).eval()  # type: ignore[arg-type]
    x = torch.randn(1, c, side, side, dtype=torch.float64)
    with torch.no_grad():
        keep = torch.rand((m + 2) ** 2, c, -(-k // 16)) < density
        layer.weight.mul_(keep.repeat_interleave(16, 2)[..., :k])
        expected = layer(x)
        added = torch.randn_like(expected) if residual else None
        expected = ACTIVATIONS[activation](expected if added is None else expected + added)
    for sparse in (False, True):
        packed = pack_gpu_domain(layer.weight, layer.bias, GpuAlgorithm(m, points=points, relu=relu), "cpu", sparse)
        if sparse:
            assert packed.density == pytest.approx(float(keep.double().mean()))
        y = gpu_winograd_conv2d(x.float(), packed, (1, 1), None if added is None else added.float(), activation)
        scale = float(expected.norm()) + math.sqrt(expected.numel())
        assert float((y - expected).norm()) <= 4 * ERRORS[m] * scale


@pytest.mark.parametrize(
    ("dtype", "m", "worst"),
    [
        (torch.float32, 2, 5e-7), (torch.float32, 4, 4e-6), (torch.float32, 6, 8e-6),
        (torch.float16, 2, 1.5e-3), (torch.float16, 4, 8e-3), (torch.float16, 6, 1.5e-2),
        (torch.bfloat16, 2, 1.2e-2), (torch.bfloat16, 4, 6e-2),
    ],
)  # fmt: skip
def test_error_of_a_layer_in_every_way(dtype: torch.dtype, m: int, worst: float) -> None:
    """Channels of very different size lose no more than others; the ways differ in the order of sums only."""
    x, weight, bias = case(1, 1, 24, 7, 9, 24)
    weight *= torch.logspace(-3, 1, 24)[:, None, None, None]
    x = x.to(dtype)
    packed = pack_gpu(weight, None, GpuAlgorithm(m, dtype), "cpu")
    reference = exact(x, weight, None, (1, 1))
    for y in ways(packed, x, (1, 1)).values():
        assert y.dtype == dtype
        assert worst / 100 < max(relative_error(y[:, k], reference[:, k]) for k in range(24)) < worst
    full = gpu_winograd_conv2d(x, pack_gpu(weight, bias, packed.algorithm, "cpu"), (1, 1), None, "silu")
    assert relative_error(full, exact(x, weight, bias, (1, 1), None, "silu")) < worst


@pytest.mark.parametrize("m", [2, 4, 6])
def test_large_numbers_of_float16_stay_finite(m: int) -> None:
    """The transform of an input makes numbers up to 225 times as large."""
    signs = torch.randint(2, (1, 3, 9, 9), generator=torch.Generator().manual_seed(m)) * 2 - 1
    x = (60000 * signs).half()
    weight = torch.full((16, 3, 3, 3), 1e-3)
    y = gpu_winograd_conv2d(x, pack_gpu(weight, None, GpuAlgorithm(m, torch.float16), "cpu"), (1, 1))
    assert float((y - exact(x, weight, None, (1, 1))).abs().max()) < 3e-2 * 60000 * 27e-3


@pytest.mark.parametrize("kind", ["channels first", "slice", "transposed"])
def test_memory_orders_and_nothing_outside_is_read(kind: str) -> None:
    """NaN around the input and the residual does not come in."""
    x, weight, bias = case(3, 2, 19, 9, 7, 19)
    residual = torch.randn(2, 19, 9, 7).contiguous(memory_format=torch.channels_last)
    packed = pack_gpu(weight, bias, GpuAlgorithm(4), "cpu")
    expected = gpu_winograd_conv2d(x, packed, (1, 1), residual, "relu")
    found = gpu_winograd_conv2d(strided(x)[kind], packed, (1, 1), strided(residual)[kind], "relu")
    assert same(found, expected)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    n, c, h, w = x.shape
    wide = torch.full((n, h + 2, w + 3, c + 5), math.nan).permute(0, 3, 1, 2)
    slices = wide[:, 2 : 2 + c, 1 : 1 + h, 1 : 1 + w]
    slices.copy_(x)
    return {"channels first": x.contiguous(), "slice": slices, "transposed": x.transpose(2, 3).clone().transpose(2, 3)}


@pytest.mark.parametrize("sparse", [False, True])
def test_stretches_of_tiles_give_the_same_bits(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory that holds eleven of 64 tiles: the last stretch is a shorter one."""
    x, _, bias = case(4, 4, 20, 8, 7, 20)
    weight = torch.randn(16, 20, 20) / 10
    packed = pack_gpu_domain(weight, bias, GpuAlgorithm(2), "cpu", sparse)
    expected = gpu_winograd_conv2d(x, packed, (1, 1), x)
    wide = 20 if sparse else 32
    monkeypatch.setattr(runs, "SCRATCH_BYTES", 16 * 4 * (wide + 32) * 11)
    assert same(gpu_winograd_conv2d(x, packed, (1, 1), x), expected)
    if not sparse:
        by_library = ways(packed, x, (1, 1))["library"]
        assert relative_error(by_library, gpu_winograd_conv2d(x, packed, (1, 1)).double()) < 1e-6


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_large_values_and_what_is_not_a_number(activation: str) -> None:
    bias = torch.tensor([1e30, -1e30, 100.0, -100.0, 90.0, -88.0, 0.0, -0.0, 6.0, 1e-30, -20.0, math.nan, 3e38])
    packed = pack_gpu(torch.zeros(len(bias), 5, 3, 3), bias, GpuAlgorithm(2), "cpu")
    y = gpu_winograd_conv2d(torch.randn(1, 5, 4, 4), packed, (0, 0), None, activation)
    expected = ACTIVATIONS[activation](bias.double()).float()[:, None, None].expand_as(y[0])
    torch.testing.assert_close(y[0], expected, rtol=2e-6, atol=1e-30 if activation != "silu" else 1e-35, equal_nan=True)


def test_wrong_tables_read_nothing_outside() -> None:
    """What they point to outside of V or of the table counts as zero."""
    x = torch.randn(1, 20, 6, 6)
    packed = pack_gpu_domain(torch.randn(16, 20, 16), None, GpuAlgorithm(2), "cpu", sparse=True)
    assert packed.list is not None
    assert packed.starts is not None
    tables = Tables(packed.weight, packed.bias, packed.list.clone(), packed.starts.clone())
    assert tables.list is not None
    assert tables.starts is not None
    tables.list[::2] += 2**20
    tables.list[1::2] -= 2**20
    tables.starts[-1] += 2**40
    y = run(x, tables, None, (1, 1), 16, packed.algorithm, "none")
    assert torch.count_nonzero(y) == 0


def test_an_empty_batch_and_no_weight_left() -> None:
    packed = pack_gpu(torch.randn(8, 4, 3, 3), None, GpuAlgorithm(4), "cpu")
    assert gpu_winograd_conv2d(torch.empty(0, 4, 8, 8), packed, (1, 1)).shape == (0, 8, 8, 8)
    none = pack_gpu_domain(torch.zeros(16, 4, 8), torch.arange(8.0), GpuAlgorithm(2), "cpu", sparse=True)
    y = gpu_winograd_conv2d(torch.randn(1, 4, 5, 5), none, (1, 1))
    assert torch.equal(y, torch.arange(8.0)[None, :, None, None].expand_as(y))


class Net(torch.nn.Module):
    """Two convolutions that Winograd's kernels fit, one with a sum and an activation of its own, and one they don't."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(torch.nn.functional.hardswish(self.second(y) + y))


@pytest.mark.parametrize("forced", [True, False])
def test_a_lowered_network(forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded, fused and checked as on a CPU; the fastest kernels are taken, but for those whose error is too large."""
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 9, 9)
    net.norm.running_mean.normal_()
    times = {"torch": 2.0, "F2": 1.0, "F4": 0.5, "F6": 3.0, "F2 tf32x3": 1.5, "F4 tf32x3": 1.5}
    monkeypatch.setattr(on_gpu, "measured", lambda kernels, args: {name: times[name] for name in kernels})
    monkeypatch.setattr(on_gpu, "passes", lambda *_: {})
    made = on_gpu.build

    def build(layer: AnyLayer, choice: str, *rest: Any) -> torch.nn.Module:
        kernel = made(layer, choice, *rest)
        return torch.nn.Sequential(kernel, Worse()) if choice == "F4" and layer.name == "first" else kernel

    class Worse(torch.nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y * 1.01

    monkeypatch.setattr(on_gpu, "build", build)
    fast = on_gpu.lower_on_gpu(net, (x,), "F2" if forced else None, None)
    assert [one.choice for one in fast.report.layers] == (["F2", "F2", "torch"] if forced else ["F2", "F4", "torch"])
    assert [one.rejected for one in fast.report.layers] == [() if forced else ("F4",), (), ()]
    assert fast.report.folded == 1
    assert fast.report.error < 1e-5
    more = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        assert relative_error(fast(more), net.double()(more.double())) < 1e-5


def test_lowered_in_half_precision() -> None:
    torch.manual_seed(0)
    net, x = Net().eval().bfloat16(), torch.randn(1, 3, 9, 9).bfloat16()
    fast = on_gpu.lower_on_gpu(net, (x,), "F2", None)
    assert [one.choice for one in fast.report.layers] == ["F2", "F2", "torch"]
    assert 1e-4 < max(one.error for one in fast.report.layers) < 1e-2
    with pytest.raises(TersenetError, match="one device and of one type"):
        on_gpu.lower_on_gpu(net, (x.float(),), None, None)
    with pytest.raises(TersenetError, match="Known on a GPU"):
        on_gpu.lower_on_gpu(net, (x,), "amx", None)


def test_what_does_not_fit_together() -> None:
    packed = pack_gpu(torch.randn(8, 4, 3, 3), None, GpuAlgorithm(4), "cpu")
    x = torch.randn(1, 4, 6, 6)
    for wrong, message in (
        ((x.half(), packed), "must be float32"),
        ((x[:, :3], packed), "4 channels"),
        ((x.to("meta"), packed), "dense tensor on cpu"),
        ((x, packed, (1, 1), x), "residual"),
        ((x, packed, (1, 1), None, "gelu"), "activation"),
        ((x[:, :, :2, :2], packed), "no room"),
    ):
        with pytest.raises(TersenetError, match=message):
            gpu_winograd_conv2d(*wrong)
    for m, dtype, isa in itertools.product((2, 3), (torch.float32, torch.float64), ("triton", "avx2")):
        if (m, dtype, isa) != (2, torch.float32, "triton"):
            with pytest.raises(TersenetError):
                GpuAlgorithm(m, dtype, isa)
