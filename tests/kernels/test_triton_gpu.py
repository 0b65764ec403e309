"""The Triton kernels on a GPU, where there is one: every way, type and precision, through torch's operators too."""

from __future__ import annotations

import pytest
import torch
from kernel_support import ACTIVATIONS, exact, relative_error
from torch import Tensor, nn

from tersenet.kernels.gpu.host import interpreted, problem
from tersenet.kernels.gpu.operator import gpu_winograd_conv2d
from tersenet.kernels.gpu.pack import GpuAlgorithm, pack_gpu, pack_gpu_domain
from tersenet.kernels.gpu.run import Call, Tables, run
from tersenet.lowering.lower import lower
from tersenet.models.build import build

pytestmark = pytest.mark.skipif(
    interpreted() or problem() is not None,
    reason=f"no Triton kernels on a GPU: {problem() or 'TRITON_INTERPRET is set'}",
)

# float32 as on a CPU; TF32 and 16-bit types lose what their significant bits are.
WORST = {
    (torch.float32, "triton"): {2: 5e-7, 4: 4e-6, 6: 8e-6},
    (torch.float32, "triton-tf32x3"): {2: 5e-6, 4: 4e-5, 6: 8e-5},
    (torch.float32, "triton-tf32"): {2: 3e-3, 4: 2e-2},
    (torch.float16, "triton"): {2: 1.5e-3, 4: 8e-3, 6: 1.5e-2},
    (torch.bfloat16, "triton"): {2: 1.2e-2, 4: 6e-2},
}
CASES = [(dtype, isa, m) for (dtype, isa), found in WORST.items() for m in found]


def layer(n: int, c: int, side: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(n, c, side, side + 3, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    residual = torch.randn(n, k, side, side + 3, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(k, c, 3, 3, device="cuda", dtype=torch.float64) / (3 * c**0.5)
    return x, weight, torch.randn(k, device="cuda"), residual


@pytest.mark.parametrize(("n", "c", "side", "k"), [(1, 64, 28, 64), (3, 40, 13, 70), (8, 256, 7, 128)])
@pytest.mark.parametrize(("dtype", "isa", "m"), CASES)
def test_every_way_equals_torch(dtype: torch.dtype, isa: str, m: int, n: int, c: int, side: int, k: int) -> None:
    x, weight, bias, residual = layer(n, c, side, k, dtype)
    packed = pack_gpu(weight, bias, GpuAlgorithm(m, dtype, isa), "cuda")
    expected = exact(x, weight, bias.double(), (1, 1), residual, "relu")
    tables = Tables(packed.weight, packed.bias)
    ways = Call(x, residual, residual, tables, (1, 1), packed.algorithm, "relu").ways
    for way in [None, *ways]:
        y = run(x, tables, residual, (1, 1), k, packed.algorithm, "relu", way)
        assert relative_error(y, expected) < WORST[dtype, isa][m], way
    y = gpu_winograd_conv2d(x, packed, (1, 1), residual, "relu")
    assert relative_error(y, expected) < WORST[dtype, isa][m]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("dtype", "isa", "m"), [case for case in CASES if case[2] < 6])
def test_pruned_weights(dtype: torch.dtype, isa: str, m: int, relu: bool) -> None:
    """What the dense kernel makes of the same zeros."""
    x, _, bias, residual = layer(2, 80, 17, 72, dtype)
    keep = torch.rand((m + 2) ** 2, 80, 5, device="cuda") < 0.3
    weight = torch.randn((m + 2) ** 2, 80, 72, device="cuda") / 30 * keep.repeat_interleave(16, 2)[..., :72]
    exactly = pack_gpu_domain(weight, bias, GpuAlgorithm(m, relu=relu), "cuda")
    expected = gpu_winograd_conv2d(x.float(), exactly, (1, 1), residual.float(), "silu")
    packed = pack_gpu_domain(weight, bias, GpuAlgorithm(m, dtype, isa, relu=relu), "cuda", sparse=True)
    y = gpu_winograd_conv2d(x, packed, (1, 1), residual, "silu")
    assert relative_error(y, expected) < 2 * WORST[dtype, isa][m]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_large_values_and_what_is_not_a_number(activation: str) -> None:
    bias = torch.tensor([1e30, -1e30, 100.0, -100.0, 0.0, -0.0, 6.0, -20.0, float("nan"), 3e38], device="cuda")
    packed = pack_gpu(torch.zeros(len(bias), 5, 3, 3), bias, GpuAlgorithm(2), "cuda")
    y = gpu_winograd_conv2d(torch.randn(1, 5, 4, 4, device="cuda"), packed, (0, 0), None, activation)
    expected = ACTIVATIONS[activation](bias.double()).float()[:, None, None].expand_as(y[0])
    torch.testing.assert_close(y[0], expected, rtol=2e-6, atol=1e-30, equal_nan=True)


def test_in_a_cuda_graph_and_in_compiled_code() -> None:
    x, weight, bias, residual = layer(2, 32, 14, 48, torch.float32)
    packed = pack_gpu(weight, bias, GpuAlgorithm(4), "cuda")

    def called(x: Tensor) -> Tensor:
        return gpu_winograd_conv2d(x, packed, (1, 1), residual, "relu")

    with torch.no_grad():
        expected = called(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = called(x)
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(torch.compile(called, fullgraph=True)(x), expected)


@pytest.mark.parametrize("choice", [None, "F2", "F4 tf32x3"])
def test_lowered_networks(choice: str | None) -> None:
    torch.manual_seed(0)
    net = build("resnet20").eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(4, 3, 32, 32)
    fast = lower(net.cuda(), x.cuda(), choice=choice)
    with torch.no_grad():
        expected = net.double()(x.double().cuda())
    assert relative_error(fast(x.cuda()), expected) < 1e-3
    if choice is not None:
        assert {one.choice for one in fast.report.layers} == {choice, "torch"}
