"""Convolutions of quantized networks in integers, in IR: float32 or levels in and out, 32-bit sums in between.

    x -> levels of the input -> [B^T d B of every tile -> levels] -> sums of products with the weight's levels, exact
      -> [levels of the sums, each tap by itself -> A^T M A] -> bias -> [levels of the output] -> scale and shift
      -> residual -> activation

What is in brackets is Winograd's, or only where a layer rounds it. The first task writes the levels of the padded image
once, into planes that all threads read:

* plane[image][phase of the stride][chunk of 64 inputs][row][column][64]
* V[tap][chunk][tile][64] of a block of tiles, for Winograd
* U[block of output channels][tap][chunk][column of the block][quad of inputs][outputs of a vector][4]

A tap of a direct convolution's kernel is a place in the plane, so any stride and dilation costs the same. On AMX's
tiles levels are signed. VNNI multiplies unsigned by signed bytes: there what is multiplied has 128 added to it, and
sums start at -128 times the sum of the weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from fractions import Fraction

from tersenet.errors import TersenetError
from tersenet.kernels.host import AMX, ISAS, Isa, host
from tersenet.kernels.int8_direct import direct_functions
from tersenet.kernels.int8_product import product_kernels
from tersenet.kernels.int8_quantize import quantize_function
from tersenet.kernels.int8_winograd import winograd_functions
from tersenet.kernels.ir import Module

Matrix = tuple[tuple[Fraction, ...], ...]

_X86 = {isa.name: isa for isa in ISAS["x86"]}
INT8_ISAS = (
    replace(AMX, name="amx-int8", needs=(*AMX.needs, "amx-int8"), extra="+amx-tile,+amx-int8"),
    replace(_X86["avx512"], name="avx512-vnni", needs=(*_X86["avx512"].needs, "avx512vnni"), extra="+avx512vnni"),
    replace(_X86["avx2"], name="avx-vnni", needs=(*_X86["avx2"].needs, "avxvnni"), extra="+avxvnni"),
)
"""Best first."""


@dataclass(frozen=True)
class Int8:
    """The code for all sizes, which are arguments.

    at (m, t), bt (t, t): A^T and B^T of F(m, r); empty for a direct convolution. `product` and `output`: whether the
    sums of a tap, and the output, are rounded. `taken`: the input has been rounded, it is levels in bytes; `given`: the
    result is rounded to the levels that the next layer makes of it.
    """

    isa: Isa
    at: Matrix = ()
    bt: Matrix = ()
    product: bool = False
    output: bool = False
    taken: bool = False
    given: bool = False

    @property
    def name(self) -> str:
        what = "direct"
        if self.at:
            digest = hashlib.sha256(repr((self.at, self.bt)).encode()).hexdigest()[:12]
            what = f"f{len(self.at)}-{digest}{'-product' if self.product else ''}"
        flags = "".join(f"-{flag}" for flag in ("output", "taken", "given") if getattr(self, flag))
        return f"int8-{what}{flags}-{self.isa.name}"

    @property
    def tasks(self) -> tuple[str, str]:
        return "run_quantize", "run_winograd" if self.at else "run_direct"


def usable_isas() -> tuple[Isa, ...]:
    """Those of `INT8_ISAS` that this processor has and this process may use.

    Raises: TersenetError where there are no kernels at all.
    """
    machine = host()
    tiles = machine.amx_problem is None
    return tuple(
        isa
        for isa in INT8_ISAS
        if machine.family == "x86" and machine.features.issuperset(isa.needs) and (tiles or "amx-tile" not in isa.needs)
    )


def int8_isa(name: str | None = None) -> Isa:
    """The one called `name`, or the best.

    Raises: TersenetError where this processor has none, or not that one.
    """
    found = {isa.name: isa for isa in usable_isas()}
    if not found or (name is not None and name not in found):
        known = ", ".join(found) or "none"
        raise TersenetError(
            f"no convolutions in 8-bit integers on {name or 'this processor'} ({host().cpu}): they need AMX with bytes "
            f"or VNNI, of which it has {known}. Quantized layers run on torch's operators instead"
        )
    return found[name] if name else next(iter(found.values()))


def generate_int8(algorithm: Int8) -> str:
    """The text of its module, with `algorithm.tasks`."""
    isa = algorithm.isa
    bits = isa.width * 32
    module = Module(isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    quantize_function(module, isa, bool(algorithm.at), algorithm.taken)
    product_kernels(module, isa)
    if algorithm.at:
        winograd_functions(
            module, isa, algorithm.at, algorithm.bt, algorithm.product, algorithm.output, algorithm.given
        )
    else:
        direct_functions(module, isa, algorithm.output, algorithm.given)
    return module.text()
