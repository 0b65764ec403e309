"""The pieces that write IR, without a processor: linear maps on numbers, and modules that LLVM accepts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import llvmlite.binding as llvm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersenet.kernels.generate import OUTPUTS, TASKS, Algorithm, generate
from tersenet.kernels.host import ISAS, Isa
from tersenet.kernels.ir_vectors import constant
from tersenet.kernels.linear import apply
from tersenet.kernels.plan import plan
from tersenet.ops.cook_toom import cook_toom

ALL = [isa for family in ISAS.values() for isa in family]


class Numbers:
    """Takes a `Function`'s place: calculates at once, exactly, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def splat(self, value: Fraction) -> Fraction:
        return value

    def vadd(self, a: Fraction, b: Fraction) -> Fraction:
        self.count += 1
        return a + b

    def vsub(self, a: Fraction, b: Fraction) -> Fraction:
        self.count += 1
        return a - b

    def vmul(self, a: Fraction, b: Fraction) -> Fraction:
        self.count += 1
        return a * b

    def vmuladd(self, a: Fraction, b: Fraction, c: Fraction) -> Fraction:
        self.count += 1
        return a * b + c


ENTRIES = st.sampled_from([Fraction(x) for x in ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "5/4")])


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(ENTRIES, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_linear_maps(matrix: list[list[Fraction]]) -> None:
    """Any matrix without zero rows, also where shared sums tempt."""
    matrix = [row for row in matrix if any(row)]
    inputs: Any = [Fraction(3**i + 1) for i in range(len(matrix[0]) if matrix else 0)]
    numbers: Any = Numbers()
    expected = [sum((a * x for a, x in zip(row, inputs, strict=True)), Fraction()) for row in matrix]
    assert apply(numbers, matrix, inputs) == expected


@pytest.mark.parametrize(
    ("m", "matrix", "most"), [(2, "bt", 4), (2, "at", 4), (4, "bt", 12), (4, "at", 10), (6, "bt", 24), (6, "at", 20)]
)
def test_symmetry_saves_instructions(m: int, matrix: str, most: int) -> None:
    rows = getattr(cook_toom(m, 3, "lavin"), matrix)
    numbers: Any = Numbers()
    inputs: Any = [Fraction(i) for i in range(len(rows[0]))]
    apply(numbers, rows, inputs)
    plain = sum(max(1, sum(map(bool, row)) - any(x == 1 for x in row)) for row in rows)
    assert numbers.count <= most
    assert m == 2 or most < plain


@given(st.floats(width=32, allow_nan=False))
def test_constants_are_exact(value: float) -> None:
    text = constant(value)
    assert struct.unpack("<d", struct.pack("<Q", int(text, 16)))[0] == value


@pytest.mark.parametrize("isa", ALL, ids=lambda isa: isa.name)
@pytest.mark.parametrize("m", OUTPUTS)
@pytest.mark.parametrize("weight", ["float", "half", "sparse", "scattered"])
def test_modules_are_valid(weight: str, m: int, isa: Isa) -> None:
    """Also for processors that are not here."""
    if weight == "half" and not isa.has_half:
        pytest.skip("can't convert")
    module = llvm.parse_assembly(generate(Algorithm(m, isa, weight)))
    module.verify()
    assert {function.name for function in module.functions if function.linkage.name == "external"} >= set(TASKS)


@pytest.mark.parametrize(
    ("weight", "function", "count"),
    [
        ("float", "product_{isa.columns}_{isa.rows}", lambda isa: 4 * isa.rows * isa.columns),
        ("sparse", "sparse_{isa.rows}", lambda isa: 3 * isa.rows),
        ("scattered", "scattered_4", lambda isa: 4),
    ],
)
def test_sums_stay_in_registers(weight: str, function: str, count: Callable[[Isa], int]) -> None:
    """No vector of the product kernels goes to the stack."""
    for isa in ISAS["x86"][:2]:
        name = function.format(isa=isa)
        lines = assembly(isa, weight).partition(f"\n{name}:")[2].partition("Lfunc_end")[0].splitlines()
        products = [line for line in lines if "vfmadd" in line]
        assert len(products) == count(isa)
        assert not [line for line in lines if "mm" in line and "(%rsp)" in line]


def assembly(isa: Isa, weight: str) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(generate(Algorithm(2, isa, weight)))
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=isa.cpu, opt=3)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_assembly(module)


@given(
    isa=st.sampled_from(ALL),
    m=st.sampled_from(OUTPUTS),
    tiles=st.integers(1, 10**6),
    channels=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    threads=st.integers(1, 200),
    l2_bytes=st.integers(1, 1 << 24),
    weight=st.sampled_from(["float", "sparse", "scattered"]),
)
def test_plans_are_possible(
    isa: Isa, m: int, tiles: int, channels: tuple[int, int], threads: int, l2_bytes: int, weight: str
) -> None:
    found = plan(Algorithm(m, isa, weight), tiles, *channels, threads, l2_bytes)
    assert found.quad_step >= 1
    assert 1 <= found.output_step <= -(-channels[1] // isa.channels)
    if weight != "scattered":
        assert 1 <= found.block <= tiles
        return
    assert found.block == isa.width
    assert 1 <= found.groups <= -(-tiles // isa.width)
    # Sums are made in an order that depends on it.
    assert found.groups == plan(Algorithm(m, isa, weight), tiles, 1, 1, 1, 1).groups
