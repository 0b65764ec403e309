"""What the processor's vectors are, and which of the generated kernels can run on it."""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

from tersenet.errors import TersenetError, UnknownNameError

_L2_BYTES = 1 << 20
_SYSTEM_L2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


@dataclass(frozen=True)
class Isa:
    """A set of vector instructions, and the register block of the product kernel that fits its registers.

    `rows` tiles times `columns` vectors of output channels are accumulated; beside them, `columns` registers for
    weights and one for the value of a tile are needed.
    """

    name: str
    cpu: str  # LLVM's name of the plainest processor with these instructions: the code is the same on all of them
    width: int  # floats in a vector
    rows: int
    columns: int
    needs: tuple[str, ...]
    has_half: bool = True  # converts 16-bit floats
    extra: str = ""  # instructions that the code uses beside those of `cpu`, as LLVM takes them

    @property
    def channels(self) -> int:
        """Output channels of one block."""
        return self.width * self.columns


_V3 = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# Best first.
ISAS = {
    "x86": (
        Isa("avx512", "x86-64-v4", 16, 14, 2, _V4),
        Isa("avx2", "x86-64-v3", 8, 6, 2, _V3),
        Isa("sse", "x86-64", 4, 6, 2, ("sse2",), has_half=False),
    ),
    # LLVM lists the features of ARM only in part; all of its 64-bit processors have NEON.
    "arm": (Isa("neon", "generic", 4, 12, 2, ()),),
}

# Beside the vectors: matrix tiles. Only the product of bfloat16 parts runs on them.
AMX = Isa(
    "amx", "x86-64-v4", 16, 16, 2, (*_V4, "avx512bf16", "amx-tile", "amx-bf16"), extra="+avx512bf16,+amx-tile,+amx-bf16"
)
_PERMIT = (158, 0x1023, 18)  # Linux: arch_prctl, ARCH_REQ_XCOMP_PERM, the state of the tiles


@dataclass(frozen=True)
class Host:
    """The processor as LLVM knows it."""

    cpu: str
    features: frozenset[str]
    family: str  # "x86", "arm" or the machine's name
    l2_bytes: int

    def isas(self) -> tuple[Isa, ...]:
        """What this processor can execute, best first."""
        return tuple(isa for isa in ISAS.get(self.family, ()) if self.features.issuperset(isa.needs))

    def isa(self, name: str | None = None) -> Isa:
        """The one called `name`, or the best.

        Raises:
            TersenetError: there are no kernels for this processor, or it does not have these instructions.
        """
        if name == AMX.name:
            return self.amx()
        found = {isa.name: isa for isa in self.isas()}
        if not found:
            raise TersenetError(
                f"there are no generated kernels for this processor ({self.family}, {self.cpu}); "
                "x86 with SSE2 and 64-bit ARM have them. torch's own convolution works everywhere."
            )
        known = {isa.name for family in ISAS.values() for isa in family}
        if name is not None and name not in known:
            raise UnknownNameError("instruction set", name, known)
        if name is not None and name not in found:
            raise TersenetError(f"this processor ({self.cpu}) can't run {name}; it can run {', '.join(found)}")
        return found[name] if name else next(iter(found.values()))

    def amx(self) -> Isa:
        """The matrix tiles.

        Raises:
            TersenetError: this processor has none for bfloat16, or the system does not let this process use them.
        """
        if problem := self.amx_problem:
            raise TersenetError(f"no products on AMX's tiles: {problem}; `gemm` is the kernel for every processor")
        return AMX

    @property
    def amx_problem(self) -> str | None:
        """Why there are no matrix tiles; None if there are."""
        if self.family != "x86" or not self.features.issuperset(AMX.needs):
            return f"this processor ({self.cpu}) has none for bfloat16"
        if not _permitted():
            return "the system does not let this process use them; Linux does, from 5.16 on"
        return None


@functools.cache
def _permitted() -> bool:
    """Ask Linux for the state of the tiles, which it keeps only for processes that ask. Holds for all threads."""
    try:
        return ctypes.CDLL(None).syscall(*_PERMIT) == 0
    except (OSError, AttributeError, TypeError):
        return False


@functools.cache
def host() -> Host:
    """This machine's processor.

    Raises:
        TersenetError: llvmlite is missing or does not load.
    """
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        raise TersenetError(
            f"the CPU kernels need llvmlite, which does not load ({error}): pip install llvmlite"
        ) from None
    machine = platform.machine().lower()
    family = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(machine, machine)
    try:
        features = frozenset(name for name, on in dict(llvm.get_host_cpu_features()).items() if on)
    except RuntimeError:  # LLVM can't tell them on this system
        features = frozenset[str]()
    return Host(llvm.get_host_cpu_name(), features, family, _l2_bytes())


def _l2_bytes() -> int:
    """Second-level cache of one core, in bytes; a common size where the system does not tell."""
    try:
        return int(_SYSTEM_L2.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return _L2_BYTES
