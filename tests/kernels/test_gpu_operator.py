"""What of the GPU's kernels needs neither Triton nor a GPU: packed weights, operators, what is said without them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from kernel_support import exact, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tersenet.errors import TersenetError
from tersenet.kernels.gpu.host import problem
from tersenet.kernels.gpu.operator import dense_on_gpu, gpu_winograd_conv2d, sparse_on_gpu
from tersenet.kernels.gpu.pack import WIDTH, GpuAlgorithm, GpuPacked, pack_gpu, pack_gpu_domain
from tersenet.kernels.gpu.timing import fastest


def unpacked(packed: GpuPacked) -> Tensor:
    """(t t, C_in, C_out) in float64, without padding."""
    taps, inputs, outputs = packed.algorithm.t**2, packed.in_channels, packed.out_channels
    weight = packed.weight.double()
    if packed.list is not None:
        assert packed.starts is not None
        full = torch.zeros(taps, -(-outputs // WIDTH), inputs, WIDTH, dtype=torch.float64)
        for row, (begin, end) in enumerate(zip(packed.starts[:-1].tolist(), packed.starts[1:].tolist(), strict=True)):
            tap, block = divmod(row, full.shape[1])
            full[tap, block, packed.list[begin:end].long()] = weight[begin:end]
        weight = full.transpose(1, 2).flatten(2)
    assert torch.count_nonzero(weight[:, inputs:]) == torch.count_nonzero(weight[:, :, outputs:]) == 0
    return weight[:, :inputs, :outputs] * packed.bias[1, :outputs] * packed.algorithm.scale


def convolved(x: Tensor, packed: GpuPacked) -> Tensor:
    """Of one tile (N, C_in, t, t): all that a packed weight is for."""
    transforms = packed.algorithm.transforms
    at, bt = (torch.tensor([[float(f) for f in row] for row in m]).double() for m in (transforms.at, transforms.bt))
    v = torch.einsum("ai,ncij,bj->nabc", bt, x.double(), bt).flatten(1, 2)
    product = torch.einsum("npc,pck->nkp", v, unpacked(packed)).unflatten(2, (len(bt), len(bt)))
    return torch.einsum("ai,nkij,bj->nkab", at, product, at) + packed.bias[0, : packed.out_channels, None, None]


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-6), (torch.float16, 8e-3), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("m", [2, 4, 6])
def test_a_packed_weight_stands_for_the_convolution(m: int, dtype: torch.dtype, worst: float) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(20, 5, 3, 3) * torch.logspace(-4, 2, 20)[:, None, None, None], torch.randn(20)
    x = torch.randn(3, 5, m + 2, m + 2)
    packed = pack_gpu(weight, bias, GpuAlgorithm(m, dtype), "cpu")
    assert packed.weight.dtype == dtype
    found, expected = convolved(x, packed), exact(x, weight, bias)
    assert max(relative_error(found[:, k], expected[:, k]) for k in range(20)) < worst
    for sparse in (False, True):
        again = pack_gpu_domain(unpacked(packed), bias, packed.algorithm, "cpu", sparse)
        torch.testing.assert_close(unpacked(again), unpacked(packed), rtol=worst, atol=0)


def test_only_what_is_left_is_kept() -> None:
    torch.manual_seed(0)
    keep = torch.rand(36, 7, 3) < 0.3
    weight = torch.randn(36, 7, 40) * keep.repeat_interleave(WIDTH, 2)[..., :40]
    packed = pack_gpu_domain(weight, None, GpuAlgorithm(4), "cpu", sparse=True)
    assert packed.weight.shape == (int(keep.sum()), WIDTH)
    assert packed.density == pytest.approx(float(keep.double().mean()))
    assert torch.equal(unpacked(packed).float(), weight)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.randn(8, 4, 5, 5), None, "C_out, C_in, 3, 3"),
        (torch.randn(8, 4, 3, 3), torch.zeros(7), "8 output channels"),
        (torch.ones(8, 4, 3, 3, dtype=torch.int32), None, "floating"),
    ],
)
def test_what_can_not_be_packed(weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        pack_gpu(weight, bias, GpuAlgorithm(2), "cpu")
    with pytest.raises(TersenetError, match="16, C_in"):
        pack_gpu_domain(weight, None, GpuAlgorithm(2), "cpu")


@pytest.mark.parametrize("name", ["winograd_conv2d", "sparse_winograd_conv2d"])
def test_operators_know_cuda_tensors(name: str) -> None:
    """The same operators as on a CPU, with the same fake kernels."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tersenet::{name}", "CUDA")
    packed = pack_gpu_domain(torch.randn(16, 4, 20), None, GpuAlgorithm(2), "cpu", name.startswith("sparse"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = {k: torch.empty_like(t, device="cuda") for k, t in vars(packed).items() if isinstance(t, Tensor)}
        moved = GpuPacked(packed.algorithm, in_channels=4, out_channels=20, **on_gpu)
        a = moved.algorithm
        x = torch.empty(2, 4, 9, 9, device="cuda").to(memory_format=torch.channels_last)
        call: list[Any] = [moved.bias, None, (1, 1), 20, a.m]
        if moved.list is not None:
            lists = (moved.list, moved.starts)
            y = torch.ops.tersenet.sparse_winograd_conv2d(
                x, moved.weight, *lists, *call, a.points, a.relu, a.isa, "relu"
            )
        else:
            y = torch.ops.tersenet.winograd_conv2d(x, moved.weight, *call, a.isa, "relu", a.points, a.relu)
    assert (tuple(y.shape), y.device.type, y.is_contiguous(memory_format=torch.channels_last)) == (
        (2, 20, 9, 9), "cuda", True,
    )  # fmt: skip


def test_packed_tensors_are_checked() -> None:
    """Generated code checks nothing itself."""
    packed = pack_gpu(torch.randn(8, 4, 3, 3), None, GpuAlgorithm(4), "cpu")
    x, rest = torch.randn(1, 4, 6, 6), (None, (1, 1), 8, 4, "triton", "none")
    for weight, bias, message in (
        (packed.weight[:-1], packed.bias, "packed weight"),
        (packed.weight.transpose(1, 2), packed.bias, "packed weight"),
        (packed.weight, packed.bias[:1], "packed bias"),
        (packed.weight.half(), packed.bias, "float16"),
    ):
        with pytest.raises(TersenetError, match=message):
            dense_on_gpu(x, weight, bias, *rest)
    kept = pack_gpu_domain(torch.randn(16, 4, 8), None, GpuAlgorithm(2), "cpu", sparse=True)
    assert kept.list is not None
    assert kept.starts is not None
    tables = (kept.weight, kept.list, kept.starts[:-1], kept.bias)
    with pytest.raises(TersenetError, match="packed starts"):
        sparse_on_gpu(x, *tables, None, (1, 1), 8, 2, "lavin", False, "triton", "none")


def test_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton does not load" in str(problem())
    packed = pack_gpu(torch.randn(8, 4, 3, 3), None, GpuAlgorithm(2), "cpu")
    with pytest.raises(TersenetError, match="no Triton kernels: triton does not load"):
        gpu_winograd_conv2d(torch.randn(1, 4, 6, 6), packed, (1, 1))
    monkeypatch.setitem(sys.modules, "triton", importlib.import_module("types"))  # any module will do
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU" in str(problem())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in str(problem())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert problem() is None
    with pytest.raises(TersenetError, match="they take CUDA tensors"):
        gpu_winograd_conv2d(torch.randn(1, 4, 6, 6), packed, (1, 1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert problem() is None


def test_the_fastest_way_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = {"first": 3.0, "second": 1.0, "third": 2.0}
    runs: list[str] = []
    ways = {name: lambda name=name: runs.append(name) for name in milliseconds}
    monkeypatch.setattr("tersenet.kernels.gpu.timing._chosen", {})

    def timed(run: Any) -> float:
        run()
        return milliseconds[runs[-1]]

    monkeypatch.setattr("tersenet.kernels.gpu.timing.timed", timed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("a key", ways) == "first"
    assert not runs
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest("a key", ways) == "second"
    count = len(runs)
    assert fastest("a key", ways) == "second"
    assert len(runs) == count
