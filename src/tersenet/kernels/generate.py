"""The IR module of one convolution algorithm for one set of vector instructions."""

from __future__ import annotations

from dataclasses import dataclass

from tersenet.errors import TersenetError
from tersenet.kernels.amx import product_kernels as amx_kernels
from tersenet.kernels.blocks import block_functions, product_block
from tersenet.kernels.blocks_amx import amx_product_block
from tersenet.kernels.blocks_scattered import scattered_functions
from tersenet.kernels.blocks_sparse import sparse_product_block
from tersenet.kernels.host import AMX, Isa, host
from tersenet.kernels.ir import Module
from tersenet.kernels.product import product_kernels
from tersenet.kernels.scattered import scattered_kernels
from tersenet.kernels.sparse import sparse_kernels
from tersenet.kernels.tiles import input_transforms, output_transforms
from tersenet.ops.cook_toom import Transforms, cook_toom

R = 3
# The points of every library: pairs p, -p make the transforms cheap. Errors in float32 are below 1e-5 up to F(6, 3).
POINTS = "lavin"
OUTPUTS = (2, 4, 6)
PARTS = {"parts": 2, "bfloat16": 1}
"""Of each number, by how weights are kept; transformed inputs have as many."""
TASKS = ("run_private", "run_input", "run_product")


@dataclass(frozen=True)
class Algorithm:
    """F(m x m, 3 x 3) on one set of vector instructions, with weights kept as "float", as "half" or, for AMX, in two
    bfloat16 "parts" or rounded to "bfloat16"; of a pruned one only what is left: "sparse" in blocks of a vector of
    output channels, "scattered" one by one. `relu`: a ReLU between the input transform and the product; `threshold`:
    what is no further than that from zero becomes zero there.

    Raises:
        TersenetError: another m; half weights where the processor can't convert them; bfloat16 ones on anything but
            AMX, or others on it.
    """

    m: int
    isa: Isa
    weight: str = "float"
    points: str = POINTS
    relu: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.m not in OUTPUTS:
            raise TersenetError(f"m (={self.m}) of F(m x m, 3 x 3) must be one of {', '.join(map(str, OUTPUTS))}")
        if self.weight == "half" and not self.isa.has_half:
            raise TersenetError(f"{self.isa.name} can't convert half-precision weights; pack them as float")
        if (self.isa.name == AMX.name) != (self.weight in PARTS):
            raise TersenetError(
                f"{self.isa.name} has no products with weights kept as {self.weight!r}: {AMX.name} takes those of "
                f"{' and '.join(PARTS)}, and nothing else does"
            )

    @property
    def name(self) -> str:
        relu = "-relu" if self.relu else f"-cut{self.threshold!r}" if self.threshold else ""
        return f"winograd-f{self.m}-{self.points}-{self.weight}{relu}-{self.isa.name}"

    @property
    def t(self) -> int:
        return self.m + R - 1

    @property
    def parts(self) -> int:
        """bfloat16 numbers in the place of one float; 0 where there are none."""
        return PARTS.get(self.weight, 0)

    @property
    def transforms(self) -> Transforms:
        return cook_toom(self.m, R, self.points)


def isa_of(kept: str, name: str | None = None) -> Isa:
    """What a weight that is kept so runs on: the instructions called `name`, or the best; for bfloat16 AMX.

    Raises: TersenetError where that is not to be had.
    """
    if kept not in PARTS:
        return host().isa(name)
    found = host().amx()
    if name not in (None, found.name):
        raise TersenetError(f"isa (={name}) must be {found.name} for a weight kept as {kept!r}, or be left out")
    return found


def generate(algorithm: Algorithm) -> str:
    """The text of its module; `TASKS` are the names of its functions."""
    bits = algorithm.isa.width * 32
    # Without these, LLVM would split 512-bit vectors in two on some processors.
    wide = f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
    module = Module(algorithm.isa.width, wide)
    transforms = algorithm.transforms
    input_transforms(module, transforms, algorithm.relu, algorithm.parts, algorithm.threshold)
    output_transforms(module, transforms)
    if algorithm.weight == "scattered":
        scattered_kernels(module, algorithm.isa)
        scattered_functions(module, algorithm.isa, transforms)
        return module.text()
    if algorithm.weight == "sparse":
        sparse_kernels(module, algorithm.isa)
        sparse_product_block(module, algorithm.isa, transforms)
    elif algorithm.parts:
        amx_kernels(module, algorithm.isa, algorithm.parts)
        amx_product_block(module, algorithm.isa, transforms, algorithm.parts)
    else:
        product_kernels(module, algorithm.isa, algorithm.weight)
        product_block(module, algorithm.isa, transforms, algorithm.weight)
    block_functions(module, algorithm.isa, transforms)
    return module.text()
