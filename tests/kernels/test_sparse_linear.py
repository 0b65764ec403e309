"""Linear layers with a pruned weight against torch in float64: all vector widths, sizes, masks, epilogues."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, ISAS, same
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.sparse_linear import rows_of
from tersenet.kernels.sparse_linear_call import KEPT, linear_call, pack_linear, sparse_linear

CUTS = ("none", "relu", "relu6")


def pruned(outputs: int, inputs: int, density: float, block: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight and bias. Some outputs and some inputs have no weight left."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
    kept = torch.rand(-(-outputs // block), inputs, generator=generator) < density
    kept = kept.repeat_interleave(block, 0)[:outputs]
    kept &= torch.rand(outputs, 1, generator=generator) < 0.8
    kept &= torch.rand(1, inputs, generator=generator) < 0.9
    return weight * kept, torch.randn(outputs, generator=generator)


def close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> bool:
    """Within float32's rounding of a sum in any order."""
    b = None if bias is None else bias.double()
    expected = ACTIVATIONS[activation](F.linear(x.double(), weight.double(), b))
    size = F.linear(x.double().abs(), weight.double().abs(), None if b is None else b.abs()).norm()
    return found.shape == expected.shape and float((found - expected).norm()) <= 2e-6 * float(size)


@settings(max_examples=100, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    kept=st.sampled_from(KEPT),
    n=st.integers(1, 9),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.02, 0.25, 0.7, 1.0]),
    block=st.sampled_from([1, 4, 16]),
    bias=st.booleans(),
    activation=st.sampled_from(CUTS),
    beside=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@example("avx512", "scattered", 1, 1, 1, 1.0, 1, False, "none", 0, 0)
@example("avx512", "sparse", 5, 600, 300, 0.25, 16, True, "relu", 0, 0)
@example("avx2", "scattered", 5, 600, 300, 0.25, 1, True, "relu", 0, 0)
def test_equals_torch(
    isa: str, kept: str, n: int, inputs: int, outputs: int, density: float, block: int, bias: bool, activation: str,
    beside: int, seed: int,
) -> None:  # fmt: skip
    weight, added = pruned(outputs, inputs, density, block, seed)
    b = added if bias else None
    # Rows that lie in wider ones, as a slice of features does.
    x = torch.randn(n, inputs + beside, generator=torch.Generator().manual_seed(seed + 1))[:, :inputs]
    packed = pack_linear(weight, b, kept, isa if isa in ISAS else None)
    assert torch.equal(packed.dense(), weight)
    found = sparse_linear(x, packed, activation)
    assert found.is_contiguous()
    assert close(found, x, weight, b, activation)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("inputs", [2**16 - 1, 2**16, 2**16 + 1])
def test_many_inputs(kept: str, inputs: int) -> None:
    """Their numbers are unsigned, and of 16 bits as long as that is enough."""
    weight, bias = pruned(5, inputs, 0.001, 1)
    weight[:, -1] = 1
    x = torch.randn(2, inputs)
    packed = pack_linear(weight, bias, kept)
    assert packed.algorithm.index == (16 if inputs <= 2**16 else 32)
    assert torch.equal(packed.dense(), weight)
    assert close(sparse_linear(x, packed), x, weight, bias)


def test_outputs_with_very_different_numbers_of_weights() -> None:
    """Those with about as many share a vector, so that little is padding."""
    weight, bias = pruned(200, 300, 0.05, 1)
    weight[::50] = torch.randn(4, 300)
    packed = pack_linear(weight, bias, "scattered", ISAS[-1])
    stored = packed.tables.weight
    assert stored is not None
    assert stored.numel() < 1.5 * int(weight.count_nonzero())
    x = torch.randn(3, 300)
    assert close(sparse_linear(x, packed), x, weight, bias)


@settings(max_examples=25, deadline=None)
@given(
    kept=st.sampled_from(KEPT),
    outputs=st.integers(1, 300),
    n=st.integers(1, 9),
    threads=st.integers(1, 4),
    isa=st.sampled_from(ISAS),
)
def test_threads_and_the_other_rows_don_t_change_a_bit(kept: str, outputs: int, n: int, threads: int, isa: str) -> None:
    weight, bias = pruned(outputs, 90, 0.3, 1, outputs)
    packed = pack_linear(weight, bias, kept, isa)
    x = torch.randn(n, 90)
    expected = torch.cat([sparse_linear(row, packed, "relu") for row in x.split(1)])
    # So many floats that every thread gets work.
    call = linear_call(packed.algorithm, n, 90, outputs, 2**30, "relu", threads)
    assert call.threads == min(threads, packed.vectors)
    assert same(call.run(x, packed.tables, None, torch.full((n, outputs), math.nan)), expected)


def test_what_is_not_a_number_stays_so_where_it_is_read() -> None:
    weight, bias = pruned(40, 50, 0.3, 16)
    weight[:, 7] = 0
    weight[:20, 7] = 1
    x = torch.randn(2, 50)
    x[1, 7] = math.nan
    for kept in KEPT:
        found = sparse_linear(x, pack_linear(weight, bias, kept), "relu")
        assert bool(found[1, :20].isnan().all())
        assert not bool(found[0].isnan().any())


def test_an_empty_batch() -> None:
    weight, bias = pruned(20, 30, 0.3, 1)
    assert sparse_linear(torch.zeros(0, 30), pack_linear(weight, bias, "sparse")).shape == (0, 20)


def test_rows_fit_the_registers() -> None:
    from tersenet.kernels.host import ISAS as ALL

    for family in ALL.values():
        for isa in family:
            # Four sums for each row, of 16 registers, of which some have weights and inputs; wide ones have 32.
            assert 4 * rows_of(isa) <= (16 if isa.width == 16 or isa.name == "neon" else 8)


@pytest.mark.parametrize(
    ("weight", "bias", "kept", "message"),
    [
        (torch.zeros(4, 4, 1), None, "sparse", r"must be float32 and of shape \(out, in\)"),
        (torch.zeros(4, 4).double(), None, "sparse", "weight .=torch.float64"),
        (torch.zeros(0, 4), None, "scattered", "weight"),
        (torch.zeros(4, 4, device="meta"), None, "sparse", "is on meta"),
        (torch.zeros(4, 4), torch.zeros(3), "sparse", r"bias \(=\(3,\)\) must have one value for each of 4"),
        (torch.zeros(4, 4), None, "blocks", "kept"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, bias: Tensor | None, kept: str, message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        pack_linear(weight, bias, kept)
