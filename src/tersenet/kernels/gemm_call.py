"""One call of the generated dense convolution: packed weights, how it is cut, memory, threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.gemm import Gemm
from tersenet.kernels.host import Isa, host
from tersenet.kernels.layout import Pair, image_size
from tersenet.kernels.memory import settled
from tersenet.kernels.product import QUAD
from tersenet.kernels.winograd import BITS, Call, Tables

_LINE = 16  # floats in a cache line
_L2_SHARE = 0.55  # of a core's second-level cache, for V
_MOST_GROUPS = 6  # more groups use a weight more often, but the outputs go farther: best from 64 to 1024 channels
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_THREAD_MACS = 2**18  # less than about 3 microseconds of work is not worth waking a thread


@dataclass(frozen=True)
class PackedGemm:
    """`weight` (blocks, kH, kW C_in, channels of a block) and `bias` (padded C_out,), padded with zeros."""

    algorithm: Gemm
    tables: Tables
    in_channels: int
    out_channels: int
    kernel: Pair


def pack_gemm(weight: Tensor, bias: Tensor | None = None, isa: str | None = None) -> PackedGemm:
    """Pack the weight (C_out, C_in, kH, kW) of a convolution, and its bias (C_out,).

    Raises: TersenetError for another shape, type or device, or an `isa` that this processor can't run.
    """
    algorithm = Gemm(host().isa(isa))
    check_packable(weight, bias)
    outputs, inputs, high, wide = weight.shape
    block, floats = algorithm.isa.channels, wide * inputs
    padded = torch.zeros(-(-outputs // block) * block, high, -(-floats // QUAD) * QUAD)
    padded[:outputs, :, :floats] = weight.detach().permute(0, 2, 3, 1).flatten(2)
    added = torch.zeros(len(padded))
    if bias is not None:
        added[:outputs] = bias.detach()
    packed = settled(padded.unflatten(0, (-1, block)).permute(0, 2, 3, 1))
    return PackedGemm(algorithm, Tables(packed, added), inputs, outputs, (high, wide))


def check_packable(weight: Tensor, bias: Tensor | None) -> None:
    """Raises: TersenetError for what is no weight (C_out, C_in, kH, kW) of a convolution, or no bias (C_out,) of it."""
    if weight.ndim != 4 or 0 in weight.shape or weight.dtype != torch.float32:
        raise TersenetError(
            f"weight (={weight.dtype} {tuple(weight.shape)}) must be float32 and of shape (C_out, C_in, kH, kW)"
        )
    if weight.device.type != "cpu":
        raise TersenetError(f"weight is on {weight.device}; the CPU kernels take CPU tensors")
    if bias is not None and bias.shape != (len(weight),):
        raise TersenetError(f"bias (={tuple(bias.shape)}) must have one value for each of {len(weight)} channels")


@dataclass(frozen=True)
class Cut:
    """Pixels of a block, and how many blocks of output channels are taken together. It decides about speed only."""

    block: int
    output_step: int


def cut_of(isa: Isa, pixels: int, floats: int, out_channels: int, threads: int, l2_bytes: int) -> Cut:
    """Blocks of equal size whose V, `floats` for each pixel, stays in the second-level cache."""
    outputs = -(-out_channels // isa.channels)
    groups = -(-pixels // isa.rows)
    most = max(1, min(_MOST_GROUPS, int(_L2_SHARE * l2_bytes) // (4 * floats * isa.rows)))
    blocks = -(-groups // most)
    if threads > 1:
        blocks = max(blocks, min(groups, threads))
    block = min(pixels, -(-groups // blocks) * isa.rows)
    units = -(-_UNITS_PER_THREAD * threads // -(-pixels // block)) if threads > 1 else 1
    return Cut(block, max(1, outputs // units))


@functools.lru_cache(maxsize=4096)
def gemm_call(
    algorithm: Gemm,
    x: tuple[int, ...],
    x_strides: tuple[int, ...],
    residual: bool,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    out_channels: int,
    activation: str,
    threads: int,
    cut: Cut | None = None,
) -> Call:
    """For inputs (N, C_in, H, W) whose channels lie together, and for a kernel of more than one column the pixels of a
    row too, and a residual that is contiguous in channels-last memory. Nothing is checked."""
    isa = algorithm.isa
    images, channels, height, width = x
    high, wide = image_size(x[2:], kernel, stride, padding)
    shape = (images, out_channels, high, wide)
    pixels = images * shape[2] * shape[3]
    if min(shape) < 1:
        return Call(shape, b"", (), 1, 0, 0)
    segment = kernel[1] * channels
    vectors, outputs = -(-segment // isa.width), -(-out_channels // isa.channels)
    floats = kernel[0] * vectors * isa.width
    cut = cut or cut_of(isa, pixels, floats, out_channels, threads, host().l2_bytes)
    blocks = -(-pixels // cut.block)
    v_block = -(-cut.block // isa.rows) * isa.rows * floats
    own = _LINE + v_block + isa.rows * isa.channels + _LINE
    low, high = BITS[activation]
    fields = {
        "x_image": x_strides[0], "x_row": x_strides[2], "x_column": channels if kernel[1] > 1 else x_strides[3],
        "channels": channels, "height": height, "width": width, "pad_top": padding[0], "pad_left": padding[1],
        "size_high": kernel[0], "size_wide": kernel[1], "step_high": stride[0], "step_wide": stride[1],
        "out_height": shape[2], "out_width": shape[3], "out_channels": out_channels,
        "tiles": pixels, "block": cut.block, "block_count": blocks, "v_block": v_block, "vectors": vectors,
        "quads": -(-segment // QUAD), "outputs": outputs, "output_step": cut.output_step, "scratch_stride": own,
        "low": low, "high": high, "silu": activation == "silu",
    }  # fmt: skip
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    units = blocks * -(-outputs // cut.output_step)
    worth = max(1, pixels * kernel[0] * segment * out_channels // _THREAD_MACS)
    count = min(threads, units, worth)
    return Call(shape, bytes(context), tuple(kernels(algorithm).tasks.values()), count, count * own, 0)
