"""From an algorithm to functions in memory: from the cache on disk, or by LLVM."""

from __future__ import annotations

import functools
import hashlib
import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tersenet.errors import TersenetError
from tersenet.kernels import cache
from tersenet.kernels.amx import AMX_TASKS, Amx, generate_amx
from tersenet.kernels.bf16 import BF16_TASKS, Bf16, generate_bf16
from tersenet.kernels.gemm import GEMM_TASKS, Gemm, generate_gemm
from tersenet.kernels.generate import TASKS, Algorithm, generate
from tersenet.kernels.int8 import Int8, generate_int8
from tersenet.kernels.mean import MEAN_TASKS, Mean, generate_mean
from tersenet.kernels.moments import MOMENT_TASKS, MomentKernel, generate_moments
from tersenet.kernels.pool import POOL_TASKS, Pool, generate_pool
from tersenet.kernels.sequence import SEQUENCE_TASKS, Sequence, generate_sequence
from tersenet.kernels.sparse_linear import LINEAR_TASKS, SparseLinear, generate_linear
from tersenet.kernels.threads import Task
from tersenet.kernels.tile_passes import TILE_TASKS, TilePass, generate_tiles

Code = Algorithm | Gemm | Amx | Bf16 | Int8 | Mean | MomentKernel | Pool | Sequence | SparseLinear | TilePass

_lock = threading.Lock()
_loaded: dict[Code, Kernels] = {}


@dataclass(frozen=True)
class Kernels:
    """The tasks of one algorithm, by name."""

    tasks: dict[str, Task]


def kernels(algorithm: Code) -> Kernels:
    """The compiled tasks: compiled or read from disk once in a process, whichever thread comes first.

    Raises:
        TersenetError: LLVM can't make code for this machine.
    """
    found = _loaded.get(algorithm)
    if found is None:
        with _lock:
            found = _loaded.get(algorithm) or _load(algorithm)
            _loaded[algorithm] = found
    return found


def key(algorithm: Code) -> bytes:
    """Everything that the code depends on: processor, compiler, and the generator's own text."""
    llvm = _llvm()
    compiler = (importlib.import_module("llvmlite").__version__, llvm.llvm_version_info, llvm.get_process_triple())
    return repr((algorithm.name, algorithm.isa.cpu, compiler, _sources())).encode()


def _load(algorithm: Code) -> Kernels:
    llvm = _llvm()
    try:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        code = cache.read(algorithm.name, key(algorithm))
        if code is None:
            code = _compile(algorithm)
            cache.write(algorithm.name, key(algorithm), code)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(algorithm))
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        tasks = _code(algorithm)[1]
        return Kernels({name: Task(engine.get_function_address(name), engine) for name in tasks})
    except RuntimeError as error:
        raise TersenetError(f"LLVM can't make {algorithm.name} for this machine: {error}") from error


def _code(algorithm: Code) -> tuple[Callable[[], str], tuple[str, ...]]:
    """What makes the text of its module, and the names of its tasks."""
    if isinstance(algorithm, Gemm):
        return partial(generate_gemm, algorithm), GEMM_TASKS
    if isinstance(algorithm, Amx):
        return partial(generate_amx, algorithm), AMX_TASKS
    if isinstance(algorithm, Bf16):
        return partial(generate_bf16, algorithm), BF16_TASKS
    if isinstance(algorithm, Int8):
        return partial(generate_int8, algorithm), algorithm.tasks
    if isinstance(algorithm, Mean):
        return partial(generate_mean, algorithm), MEAN_TASKS
    if isinstance(algorithm, MomentKernel):
        return partial(generate_moments, algorithm), MOMENT_TASKS
    if isinstance(algorithm, Pool):
        return partial(generate_pool, algorithm), POOL_TASKS
    if isinstance(algorithm, Sequence):
        return partial(generate_sequence, algorithm), SEQUENCE_TASKS
    if isinstance(algorithm, SparseLinear):
        return partial(generate_linear, algorithm), LINEAR_TASKS
    if isinstance(algorithm, TilePass):
        return partial(generate_tiles, algorithm), TILE_TASKS
    return partial(generate, algorithm), TASKS


def _compile(algorithm: Code) -> bytes:
    """Object code of the algorithm's module."""
    llvm = _llvm()
    module = llvm.parse_assembly(_code(algorithm)[0]())
    machine = _machine(algorithm)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # The code is vectorised and unrolled as it is meant to be.
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def _machine(algorithm: Code) -> Any:
    llvm = _llvm()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=algorithm.isa.cpu, features=algorithm.isa.extra, opt=3, jit=True)


def _llvm() -> Any:
    """Imported late: where it is missing, `host` says so, and the rest of tersenet works."""
    return importlib.import_module("llvmlite.binding")


@functools.cache
def _sources() -> str:
    """Digest of the files that make the code, so that an edit or another version never meets old code."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "ops" / "cook_toom.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
