"""The Triton kernels: right in the interpreter, and made into code for GPUs that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton, or torch for CUDA, which brings it")

HERE = Path(__file__).parent
COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tersenet.kernels.gpu import winograd_kernels as made
from tersenet.kernels.gpu.pack import WIDTH, GpuAlgorithm
from tersenet.kernels.gpu.run import matrices

POINTERS = {"m": "*fp32", "table": "*fp32", "channels_kept": "*i32", "starts": "*i64"}
capability, kind, precision = int(sys.argv[1]), sys.argv[2], sys.argv[3]
most = {80: 163 * 1024, 90: 227 * 1024}[capability]  # bytes of shared memory that a program may take
at, bt = matrices(GpuAlgorithm(2))
constants = {"AT": at, "BT": bt, "TILE": 2, "SCALE": 1.0, "RELU": True, "RESIDUAL": True, "ACTIVATION": "silu",
             "PRECISION": precision, "WIDTH": WIDTH, "v_channel": 1}
for name in ("transform_input", "multiply", "multiply_kept", "transform_output", "convolve"):
    kernel = getattr(made, name)
    fits = 0
    for one in kernel.configs:
        given = {**constants, **one.kwargs}
        names = kernel.fn.arg_names
        types = {n: "constexpr" if n in given else POINTERS.get(n, "i32") for n in names}
        types |= {n: f"*{kind}" for n in ("x", "v", "u", "y", "residual", "weight") if n in names}
        source = ASTSource(kernel.fn, types, {n: given[n] for n in names if n in given},
                           {(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n][0] == "*"})
        options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": True}
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert code.asm["cubin"]
        fits += code.metadata.shared <= most
    assert fits, name
print("compiled")
"""


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton takes settings when it is imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[1:], str(HERE.parent)]), **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=280, env=environment, cwd=HERE.parents[1]
    )


def test_in_the_interpreter() -> None:
    """On the CPU, with numpy doing what the GPU would."""
    pytest.importorskip("triton", "3.9", reason="the interpreter of Triton 3.6 can't count with this numpy")
    done = python("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "kind", "precision"), [(80, "fp32", "ieee"), (90, "fp16", "ieee"), (90, "fp32", "tf32x3")]
)
def test_code_for_gpus(capability: int, kind: str, precision: str, tmp_path: Path) -> None:
    """Triton makes machine code for a GPU without one; of each kernel at least one cut fits its shared memory."""
    done = python(
        "-c", COMPILED, str(capability), kind, precision, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-4000:]
