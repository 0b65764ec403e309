"""The operator of torch: fake kernel, compile, export; and each bad argument as one clear error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_support import exact, relative_error, same
from torch import Tensor, nn

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.kernels.generate import Algorithm
from tersenet.kernels.host import AMX, host
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import pack


class Layer(nn.Module):
    """As a lowered layer will be: packed tensors as buffers, the operator in forward."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.packed = pack(weight, bias, 4)
        self.weight, self.bias = nn.Buffer(self.packed.weight), nn.Buffer(self.packed.bias)

    def forward(self, x: Tensor) -> Tensor:
        algorithm, outputs = self.packed.algorithm, self.packed.out_channels
        y = torch.ops.tersenet.winograd_conv2d(
            x, self.weight, self.bias, None, [1, 1], outputs, algorithm.m, algorithm.isa.name, "relu"
        )
        return y + 1


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer(torch.randn(12, 7, 3, 3), torch.randn(12))


def test_operator_passes_torchs_own_checks() -> None:
    """Schema and fake kernel, as torch.library.opcheck tests them."""
    torch.manual_seed(0)
    packed, x = pack(torch.randn(12, 7, 3, 3), torch.randn(12), 2), torch.randn(2, 7, 8, 9)
    rest = ([0, 1], 12, 2, packed.algorithm.isa.name, "silu")
    residual = torch.randn(2, 12, 6, 9)
    for added in (None, residual):
        torch.library.opcheck(
            torch.ops.tersenet.winograd_conv2d.default, (x, packed.weight, packed.bias, added, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_compiles_in_one_graph(layer: Layer) -> None:
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for size in (8, 8, 11):
            x = torch.randn(1, 7, size, size)
            assert same(compiled(x), layer(x))


def test_exports_with_a_batch_of_any_size(layer: Layer) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 7, 9, 9),), dynamic_shapes=({0: batch},))
    assert any("winograd_conv2d" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 7, 9, 9)
    assert same(program.module()(x), layer(x))


def test_fake_output_has_shape_and_layout() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = pack(torch.randn(5, 4, 3, 3))
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (torch.empty(2, 4, 6, 7), packed.weight, packed.bias)]
        y = torch.ops.tersenet.winograd_conv2d(*tensors, None, [2, 1], 5, 4, packed.algorithm.isa.name, "none")
    assert y.shape == (2, 5, 8, 7)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_backward_is_one_clear_error() -> None:
    x, packed = torch.randn(1, 4, 6, 6, requires_grad=True), pack(torch.randn(4, 4, 3, 3))
    y = winograd_conv2d(x, packed, (1, 1))
    assert y.requires_grad
    with pytest.raises(TersenetError, match="no backward; train the network before it is lowered"):
        y.sum().backward()
    with torch.inference_mode():
        assert same(winograd_conv2d(x, packed, (1, 1)), y.detach())


def test_weights_of_any_floating_type() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 5, 3, 3).half(), torch.randn(1, 5, 8, 8)
    assert relative_error(winograd_conv2d(x, pack(weight)), exact(x, weight)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 4, 8)}, r"x \(=torch.float32 \(1, 4, 8\)\) must be float32 and of shape"),
        ({"x": torch.randn(1, 4, 8, 8).double()}, "x .=torch.float64"),
        ({"x": torch.randn(1, 4, 8, 8).half()}, "x .=torch.float16"),
        ({"x": torch.randn(1, 4, 8, 8).to_sparse()}, "x .=torch.sparse_coo on cpu. must be"),
        ({"x": torch.randn(1, 9, 8, 8)}, r"must have the \d channels of the packed weight"),
        ({"x": torch.randn(1, 4, 1, 8), "padding": (0, 0)}, "has no room for a 3x3 kernel"),
        ({"padding": (-1, 0)}, r"padding \(-1, 0\)"),
        ({"activation": "rilu"}, "unknown activation 'rilu'; did you mean .*'relu'"),
        ({"residual": torch.randn(1, 6, 7, 8)}, r"residual .* of shape \(1, 6, 8, 8\)"),
        ({"residual": torch.randn(1, 6, 8, 8).double()}, "residual .=torch.float64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    packed = pack(torch.randn(6, 4, 3, 3))
    arguments: dict[str, Any] = {"x": torch.randn(1, 4, 8, 8), "packed": packed, "padding": (1, 1)}
    winograd_conv2d(**arguments)
    with pytest.raises(TersenetError, match=message):
        winograd_conv2d(**arguments | change)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.randn(4, 4, 5, 5), {}, r"weight .* must be floating and of shape \(C_out, C_in, 3, 3\)"),
        (torch.randn(4, 3, 3), {}, "must be floating"),
        (torch.randn(0, 4, 3, 3), {}, "must be floating"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.int8), {}, "torch.int8"),
        (torch.randn(4, 4, 3, 3, device="meta"), {}, "weight is on meta"),
        (torch.randn(4, 4, 3, 3), {"bias": torch.randn(5)}, "bias .* one value for each of 4"),
        (torch.randn(4, 4, 3, 3), {"m": 3}, r"m \(=3\) of F\(m x m, 3 x 3\) must be one of 2, 4, 6"),
        (torch.randn(4, 4, 3, 3), {"isa": "sse", "kept": "half"}, "sse can't convert half-precision weights"),
        (torch.randn(4, 4, 3, 3), {"isa": "avx51"}, "unknown instruction set 'avx51'; did you mean 'avx512'"),
    ],
)
def test_weights_that_can_not_be_packed(weight: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        pack(weight, **options)


def test_a_weight_packed_for_other_vectors_is_refused() -> None:
    """What reaches generated code is checked: it would read beyond the tensor."""
    packed, x = pack(torch.randn(40, 4, 3, 3), None, 4), torch.randn(1, 4, 8, 8)
    name = packed.algorithm.isa.name
    call = torch.ops.tersenet.winograd_conv2d
    with pytest.raises(TersenetError, match=r"packed weight .* pack it again"):
        call(x, packed.weight, packed.bias, None, [1, 1], 40, 2, name, "none")
    with pytest.raises(TersenetError, match=r"packed weight .* pack it again"):
        call(x, packed.weight[:1], packed.bias, None, [1, 1], 40, 4, name, "none")
    with pytest.raises(TersenetError, match="packed bias"):
        call(x, packed.weight, packed.bias[:, :40], None, [1, 1], 40, 4, name, "none")
    strided = packed.weight.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(TersenetError, match="must be contiguous"):
        call(x, strided, packed.bias, None, [1, 1], 40, 4, name, "none")
    with pytest.raises(UnknownNameError):
        call(x, packed.weight, packed.bias, None, [1, 1], 40, 4, "avx", "none")


def test_tiles_take_the_weights_that_are_made_for_them_and_no_others() -> None:
    """Their sizes may be those of other vectors' weights; the code would read beyond them, or there is none."""
    for isa, kinds in ((AMX, ("float", "half", "sparse", "scattered")), (host().isa(), ("parts", "bfloat16"))):
        for kept in kinds:
            with pytest.raises(TersenetError, match="has no products with weights kept as"):
                Algorithm(2, isa, kept)
    if host().amx_problem is None:
        packed, x = pack(torch.randn(40, 64, 3, 3), None, 2), torch.randn(1, 64, 8, 8)
        with pytest.raises(TersenetError, match="amx has no products with weights kept as 'float'"):
            torch.ops.tersenet.winograd_conv2d(x, packed.weight, packed.bias, None, [1, 1], 40, 2, "amx", "none")


def test_zeros_in_the_padding_do_not_hide_infinities() -> None:
    """An infinite input pixel spoils its tile, as the algorithm mixes pixels, and no other."""
    x = torch.ones(1, 1, 12, 12)
    x[0, 0, 0, 0] = math.inf
    y = winograd_conv2d(x, pack(torch.ones(1, 1, 3, 3), None, 2), (1, 1))
    assert not y[0, 0, 0, 0].isfinite()
    assert y[0, 0, 4:, 4:].isfinite().all()
