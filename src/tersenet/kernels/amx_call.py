"""One call of a dense convolution on AMX's tiles: weights in parts, how it is cut, memory, threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.amx import CHUNK, GROUP, LINE, PARTS, TILE, Amx, in_tiles
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.gemm_call import Cut, check_packable
from tersenet.kernels.host import host
from tersenet.kernels.layout import Pair, image_size
from tersenet.kernels.memory import settled
from tersenet.kernels.winograd import BITS, Call, Tables

_L2_SHARE = 0.4  # of a core's second-level cache, for V; the weights of a block of outputs need room too
_PLANE_TILES = 1.25  # times as many products cost less than copying each pixel for every row of the kernel
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_BLOCKS_PER_THREAD = 2  # the same where each block copies the lines between it and the next one again
_THREAD_MACS = 2**20  # less than about 3 microseconds of work is not worth waking a thread


@dataclass(frozen=True)
class PackedAmx:
    """`weight` in its bfloat16 parts, in tiles (see `amx`), and `bias` (padded C_out,), padded with zeros.

    `in_channels` of all groups. `plane`: the kernel's taps are places of one padded image; else each row of the
    kernel is a segment.
    """

    algorithm: Amx
    tables: Tables
    in_channels: int
    out_channels: int
    kernel: Pair
    dilation: Pair
    groups: int
    plane: bool


def pack_amx(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> PackedAmx:
    """Split and pack the weight (C_out, C_in / groups, kH, kW) of a convolution, and its bias (C_out,).

    Raises: TersenetError for another shape, type or device, dilation or groups of larger kernels beside a stride, or a
        processor without AMX.
    """
    algorithm = Amx(host().amx())
    check_packable(weight, bias)
    outputs, inputs, high, wide = weight.shape
    if max(stride) > 1 and (max(dilation) > 1 or (groups > 1 and (high, wide) != (1, 1))):
        raise TersenetError(
            f"a convolution with a stride (={stride}) can have no dilation (={dilation}) here, and groups (={groups}) "
            "only if its kernel is 1x1"
        )
    if groups < 1 or outputs % groups:
        raise TersenetError(f"groups (={groups}) must be a divisor of the {outputs} output channels")
    added = torch.zeros(outputs) if bias is None else bias.detach().to(weight)
    empty = -(outputs // groups) % algorithm.isa.channels  # of each group's last block
    added = F.pad(added.unflatten(0, (groups, -1)), (0, empty)).flatten()
    plane = stride == (1, 1) and (max(*dilation, groups) > 1 or _fills_tiles(inputs, (high, wide)))
    taps = weight.detach().permute(0, 2, 3, 1)  # outputs, rows, columns, inputs
    # outputs, parts of the kernel that V has one after the other, taps within it, floats
    rows = taps.flatten(1, 2).unsqueeze(1) if plane else taps.flatten(2).unsqueeze(2)
    rows = F.pad(rows, (0, -rows.shape[3] % CHUNK)).unflatten(0, (groups, -1))
    rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, empty)).flatten(0, 1)
    # The chunks of a part of the kernel come before its taps.
    rows = rows.unflatten(3, (-1, CHUNK)).transpose(2, 3).flatten(2, 3)
    tables = Tables(settled(in_tiles(rows.flatten(2), algorithm.isa)), added.contiguous())
    return PackedAmx(algorithm, tables, groups * inputs, outputs, (high, wide), dilation, groups, plane)


def _fills_tiles(channels: int, kernel: Pair) -> bool:
    """Whether tiles are filled nearly as well by each tap's channels as by those of a row of the kernel."""
    return kernel[1] * -(-channels // CHUNK) <= _PLANE_TILES * -(-kernel[1] * channels // CHUNK)


def cut_of(pixels: int, halo: int, floats: int, weights: int, out_blocks: int, threads: int, l2_bytes: int) -> Cut:
    """Blocks of equal size whose V, `floats` for each pixel, stays in the second-level cache. Where that is too small
    for the `halo`, pixels that a block reads behind its own, it has as many of its own: else copies take the time.

    Threads share out what is larger, so that each reads little of it: the weights, so many for each output channel, or
    the pixels.
    """
    groups = -(-pixels // GROUP)
    most = max(1, (int(_L2_SHARE * l2_bytes) // (4 * floats) - halo) // GROUP, halo // GROUP)
    blocks, steps = -(-groups // most), 1
    if threads > 1 and weights * out_blocks > floats * groups:
        steps = min(out_blocks, _UNITS_PER_THREAD * threads)
        blocks = max(blocks, min(groups, -(-threads // steps)))
    elif threads > 1:
        blocks = max(blocks, min(groups, _BLOCKS_PER_THREAD * threads))
        steps = -(-threads // blocks)
    return Cut(-(-groups // blocks) * GROUP, max(1, out_blocks // steps))


@functools.lru_cache(maxsize=4096)
def amx_call(
    algorithm: Amx,
    x: tuple[int, ...],
    x_strides: tuple[int, ...],
    plane: bool,
    dilation: Pair,
    groups: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    out_channels: int,
    activation: str,
    threads: int,
    cut: Cut | None = None,
) -> Call:
    """For inputs (N, C_in, H, W) whose channels lie together, and without `plane` the pixels of a row too, and a
    residual that is contiguous in channels-last memory. Nothing is checked."""
    isa = algorithm.isa
    images, channels, height, width = x[0], x[1] // groups, x[2], x[3]
    high, wide = image_size(x[2:], kernel, stride, padding, dilation)
    shape = (images, out_channels, high, wide)
    if min(shape) < 1:
        return Call(shape, b"", (), 1, 0, 0)
    x_row = x_strides[2]
    if kernel == stride == (1, 1) and padding == (0, 0) and x_strides[0] == height * x_row:
        images, height, high = 1, images * height, images * high  # one image below the other
    line = width + 2 * padding[1] if plane else wide
    taps, copied = (kernel, (1, 1)) if plane else ((1, 1), kernel)
    slices = -(-copied[1] * channels // CHUNK)
    vectors, in_group = copied[0] * slices, -(-(out_channels // groups) // isa.channels)
    floats, outputs = vectors * CHUNK, groups * in_group
    pixels, halo = (high - 1) * line + wide, (taps[0] - 1) * dilation[0] * line + (taps[1] - 1) * dilation[1]
    cut = cut or cut_of(pixels, halo, groups * floats, taps[0] * taps[1] * floats, outputs, threads, host().l2_bytes)
    blocks = -(-pixels // cut.block)
    kept = -(-cut.block // LINE) * LINE + halo
    line_floats = PARTS * LINE  # of a pixel in a chunk
    v_block = groups * vectors * kept * line_floats
    own = LINE + v_block + 2 * isa.columns * TILE + LINE
    low, high_bits = BITS[activation]
    fields = {
        "x_image": x_strides[0], "x_row": x_row, "x_column": channels if copied[1] > 1 else x_strides[3],
        "channels": channels, "height": height, "width": width, "pad_top": padding[0], "pad_left": padding[1],
        "size_high": taps[0], "size_wide": taps[1], "copy_high": copied[0], "copy_wide": copied[1],
        "step_high": stride[0], "step_wide": stride[1], "line": line, "halo": halo,
        "tap_high": dilation[0] * line * LINE, "tap_wide": dilation[1] * LINE,
        "out_height": high, "out_width": wide, "out_channels": out_channels, "tiles": pixels,
        "block": cut.block, "block_count": blocks, "units": images * blocks, "v_block": v_block,
        "groups": groups, "group_channels": out_channels // groups, "group_outputs": in_group,
        "v_vector": kept * line_floats, "v_low": kept * LINE, "m_vector": GROUP * LINE, "chunks": vectors,
        "slices": slices,
        "outputs": outputs, "output_step": cut.output_step, "scratch_stride": own,
        "low": low, "high": high_bits, "silu": activation == "silu",
    }  # fmt: skip
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    units = images * blocks * -(-outputs // cut.output_step)
    worth = max(1, shape[0] * shape[2] * shape[3] * channels * kernel[0] * kernel[1] * out_channels // _THREAD_MACS)
    count = min(threads, units, worth)
    return Call(shape, bytes(context), tuple(kernels(algorithm).tasks.values()), count, count * own, 0, True)
