"""Which kernels a processor gets, without having it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kernel_support import ISAS

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.kernels import host as host_module
from tersenet.kernels.host import ISAS as ALL
from tersenet.kernels.host import Host, host

V3 = {"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "sse2"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("family", "features", "names"),
    [
        ("x86", V4, ["avx512", "avx2", "sse"]),
        ("x86", V4 - {"avx512vl"}, ["avx2", "sse"]),
        ("x86", V3, ["avx2", "sse"]),
        ("x86", V3 - {"fma"}, ["sse"]),
        ("arm", {"fp-armv8"}, ["neon"]),
        ("arm", set[str](), ["neon"]),
    ],
)
def test_what_a_processor_can_run(family: str, features: set[str], names: list[str]) -> None:
    found = Host("some", frozenset(features), family, 1 << 20)
    assert [isa.name for isa in found.isas()] == names
    assert found.isa().name == names[0]
    for name in names:
        assert found.isa(name).name == name


def test_what_it_can_not_run_is_said() -> None:
    old = Host("nehalem", frozenset({"sse2"}), "x86", 1 << 20)
    with pytest.raises(TersenetError, match=r"this processor \(nehalem\) can't run avx2; it can run sse"):
        old.isa("avx2")
    with pytest.raises(TersenetError, match="can't run neon"):
        old.isa("neon")
    with pytest.raises(UnknownNameError, match="unknown instruction set 'sse5'; did you mean 'sse'"):
        old.isa("sse5")
    with pytest.raises(TersenetError, match=r"no generated kernels for this processor \(riscv64, rva23\)"):
        Host("rva23", frozenset({"v"}), "riscv64", 1 << 20).isa()


def test_registers_suffice() -> None:
    """Sums, weights and one value of a tile: 32 registers with AVX-512 and NEON, 16 else."""
    for isa in (isa for family in ALL.values() for isa in family):
        registers = 32 if isa.name in ("avx512", "neon") else 16
        assert isa.rows * isa.columns + isa.columns + 1 <= registers


def test_without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    with pytest.raises(TersenetError, match=r"need llvmlite, which does not load .*: pip install llvmlite"):
        host.__wrapped__()


@pytest.mark.slow
def test_without_llvmlite_the_operator_says_so() -> None:
    program = (
        "import sys; sys.modules['llvmlite'] = None\n"
        "import torch, tersenet.kernels.operator\n"
        "from tersenet.kernels.pack import pack\n"
        "pack(torch.ones(1, 1, 3, 3))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "TersenetError: the CPU kernels need llvmlite" in found.stderr


@pytest.mark.parametrize(("text", "size"), [("2048K\n", 2 << 20), ("", 1 << 20), ("big", 1 << 20), (None, 1 << 20)])
def test_size_of_the_cache(text: str | None, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "size"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(host_module, "_SYSTEM_L2", path)
    assert host.__wrapped__().l2_bytes == size


def test_this_machine_runs_at_least_one() -> None:
    assert ISAS
