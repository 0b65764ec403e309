"""One call of a bfloat16 convolution: packed weights, types, how it is cut, memory, threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.amx import CHUNK, GROUP, LINE, TILE, in_tiles
from tersenet.kernels.bf16 import Bf16
from tersenet.kernels.bf16_finish import TALL
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.gemm_call import check_packable
from tersenet.kernels.host import host
from tersenet.kernels.layout import Pair, image_size
from tersenet.kernels.memory import settled
from tersenet.kernels.winograd import BITS, Call, Tables

_L2_SHARE = 0.4  # of a core's second-level cache, for V; the weights of a block of outputs need room too
_WEIGHT_SHARE = 0.25  # of it, for the weights of all outputs of a unit
_PIECE = 256  # pixels whose outputs are made one behind the other
_CHUNK_TILES = 1.25  # times as many products cost less than tiles whose rows lie across cache lines
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_BLOCKS_PER_THREAD = 2  # the same where each block copies the rows between it and the next one again
_THREAD_MACS = 2**20  # less than about 2 microseconds of work is not worth waking a thread


@dataclass(frozen=True)
class PackedBf16:
    """`weight` rounded to bfloat16, in tiles (see `bf16`), and `bias` (padded C_out,), padded with zeros.

    `in_channels` of all groups. `interleaved`: rows of the kernel are one piece; else each tap has its chunks.
    """

    algorithm: Bf16
    tables: Tables
    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair
    dilation: Pair
    groups: int
    interleaved: bool


@dataclass(frozen=True)
class Types:
    """Which of the tensors of a call are bfloat16; the others are float32."""

    x: bool = False
    y: bool = False
    residual: bool = False


@dataclass(frozen=True)
class Blocks:
    """Images and output rows that V holds, and blocks of output channels of a unit of work. If there are several
    images, then with all of their rows. It decides about speed only."""

    images: int
    rows: int
    output_step: int


def pack_bf16(
    weight: Tensor, bias: Tensor | None = None, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1
) -> PackedBf16:
    """Round and pack the weight (C_out, C_in / groups, kH, kW) of a convolution, and its bias (C_out,).

    Raises: TersenetError for another shape, type or device, groups that don't divide C_out, or a processor without AMX.
    """
    algorithm = Bf16(host().amx())
    check_packable(weight, bias)
    outputs, inputs, high, wide = weight.shape
    if groups < 1 or outputs % groups:
        raise TersenetError(f"groups (={groups}) must be a divisor of the {outputs} output channels")
    added = torch.zeros(outputs) if bias is None else bias.detach().to(weight)
    empty = -(outputs // groups) % algorithm.isa.channels  # of each group's last block
    added = F.pad(added.unflatten(0, (groups, -1)), (0, empty)).flatten()
    interleaved = dilation == (1, 1) and groups == 1 and not _fills_tiles(inputs, wide)
    taps = weight.detach().permute(0, 2, 3, 1)  # outputs, rows, columns, inputs
    rows = taps.flatten(2) if interleaved else taps.flatten(1, 2)
    rows = F.pad(rows, (0, -rows.shape[2] % CHUNK)).unflatten(0, (groups, -1))
    rows = F.pad(rows, (0, 0, 0, 0, 0, empty)).flatten(0, 1)
    # Chunks come before taps.
    rows = rows.unflatten(2, (-1, CHUNK)).transpose(1, 2)
    # blocks, steps, one part, columns, ... -> blocks, columns, steps, ...
    packed = in_tiles(rows.flatten(1), algorithm.isa, 1).squeeze(2).transpose(1, 2)
    tables = Tables(settled(packed), added.contiguous())
    return PackedBf16(algorithm, tables, groups * inputs, outputs, (high, wide), stride, dilation, groups, interleaved)


def dense(packed: PackedBf16) -> Tensor:
    """The weight (C_out, C_in) of a packed 1x1 convolution without groups, rounded, as float32."""
    tiles = packed.tables.weight
    assert tiles is not None
    # blocks, columns, chunks, pair, output, 2 -> blocks, columns, output, chunks, pair, 2
    rows = tiles.float().permute(0, 1, 4, 2, 3, 5).flatten(3).flatten(0, 2)
    return rows[: packed.out_channels, : packed.in_channels]


def _fills_tiles(channels: int, wide: int) -> bool:
    """Whether tiles are filled nearly as well by each tap's channels as by those of a row of the kernel."""
    return wide * -(-channels // CHUNK) <= _CHUNK_TILES * -(-wide * channels // CHUNK)


def blocks_of(
    images: int,
    rows: int,
    row_bytes: int,
    halo: int,
    pixels: int,
    weight_bytes: int,
    outputs: int,
    threads: int,
    l2_bytes: int,
) -> Blocks:
    """Blocks of equal size whose V, `row_bytes` for each of its rows, stays in the second-level cache. Where that is
    too small for the `halo`, rows that a block reads behind its own, it has as many of its own: else copies take the
    time.

    Threads share out what is larger, so that each reads little of it: the weights or the rows.
    """
    room = int(_L2_SHARE * l2_bytes) // row_bytes
    together = max(1, min(images, room // (rows + halo)))
    parts = -(-rows // max(1, room - halo, halo)) if together == 1 else 1
    steps = 1
    if threads > 1 and weight_bytes > images * rows * row_bytes:
        steps = min(outputs, _UNITS_PER_THREAD * threads)
        wanted = -(-threads // steps)
    else:
        wanted = _BLOCKS_PER_THREAD * threads if threads > 1 else 1
    together = max(1, min(together, images // wanted))
    if together == 1:
        parts = max(parts, min(rows, -(-wanted // images), max(1, rows * pixels // GROUP)))
    blocks = -(-images // together) * parts
    if threads > 1 and steps == 1:
        steps = min(outputs, -(-threads // blocks))
    return Blocks(-(-images // -(-images // together)), -(-rows // parts), -(-outputs // steps))


@functools.lru_cache(maxsize=4096)
def bf16_call(
    algorithm: Bf16,
    x: tuple[int, ...],
    x_strides: tuple[int, ...],
    types: Types,
    interleaved: bool,
    groups: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out_channels: int,
    activation: str,
    threads: int,
    cut: Blocks | None = None,
) -> Call:
    """For inputs (N, C_in, H, W) whose channels lie together, of `interleaved` ones the pixels of a row too, and a
    residual that is contiguous in channels-last memory. Nothing is checked."""
    isa = algorithm.isa
    images, channels, height, width = x[0], x[1] // groups, x[2], x[3]
    high, wide = image_size(x[2:], kernel, stride, padding, dilation)
    shape = (images, out_channels, high, wide)
    if min(shape) < 1:
        return Call(shape, b"", (), 1, 0, 0)
    x_image, _, x_row, x_column = x_strides
    is_pixel = kernel == (1, 1)
    if is_pixel and stride == (1, 1) and padding == (0, 0) and x_image == height * x_row:
        images, height, high = 1, images * height, images * high  # one image below the other
    dense = is_pixel and stride == (1, 1) and padding == (0, 0) and x_row == width * x_column
    direct = dense and types.x and channels % CHUNK == 0 and high * wide > TALL
    # Of a kernel of one row or column other pixels than those that strides meet are not needed.
    step_high, step_wide = (step if size > 1 else 1 for size, step in zip(kernel, stride, strict=True))
    copy_wide = stride[1] // step_wide
    left = -(-padding[1] // copy_wide)
    first = left * copy_wide - padding[1]
    reach = (kernel[1] - 1) * dilation[1] + 1
    places = -(-((wide - 1) * step_wide + reach) // step_wide) * step_wide
    line = places // step_wide
    count = max(0, min(places - left, -(-(width - first) // copy_wide)))
    place = channels if interleaved else CHUNK
    chunks = -(-(kernel[1] if interleaved else 1) * channels // CHUNK)
    reach_high = (kernel[0] - 1) * dilation[0]
    phases, halo = min(step_high, reach_high + 1), reach_high // step_high
    in_group = -(-(out_channels // groups) // isa.channels)
    outputs, vectors = groups * in_group, groups * (1 if interleaved else chunks)
    taps = kernel[0] * (1 if interleaved else kernel[1])
    panel = chunks * taps * isa.columns * TILE  # floats
    row_bytes = 2 * phases * places * place * vectors
    cut = cut or blocks_of(images, high, row_bytes, halo, wide, 4 * panel * outputs, outputs, threads, host().l2_bytes)
    row_blocks, image_blocks = -(-high // cut.rows), -(-images // cut.images)
    v_row = places * place
    v_phase = (cut.rows + halo) * v_row
    v_image = phases * v_phase
    numbers = cut.images * v_image  # of a chunk
    v_vector = CHUNK if interleaved or direct else numbers
    # Tiles read behind the last pixel; what they make of that is dropped.
    total = 0 if direct else vectors * numbers + TALL * step_wide * place + chunks * CHUNK
    total = -(-total // (2 * LINE)) * LINE  # floats
    own = LINE + total + 2 * isa.columns * TALL * LINE + LINE
    pixels = (cut.rows - 1) * line + wide
    # Few weights stay in the cache while all outputs of some pixels are made; many are read in the order of memory.
    few = 4 * panel * cut.output_step <= _WEIGHT_SHARE * host().l2_bytes
    piece = _PIECE if few and cut.images == 1 else pixels
    low, high_bits = BITS[activation]
    fields = {
        "x_image": x_image, "x_row": x_row, "x_column": x_column, "channels": channels, "height": height,
        "images": images, "block": cut.images, "block_rows": cut.rows, "block_count": row_blocks,
        "units": image_blocks * row_blocks, "halo": halo, "phases": phases, "step_high": stride[0],
        "pad_top": padding[0], "copy_left": left, "copy_count": count, "copy_first": first, "copy_wide": places,
        "copy_step": copy_wide, "interleaved": interleaved, "direct": direct,
        "v_row": v_row, "v_phase": v_phase, "v_image": x_image if direct else v_image, "v_vector": v_vector,
        "v_step": x_column if direct else step_wide * place, "v_own": chunks * v_vector, "v_total": total,
        "piece": piece, "size_high": kernel[0], "size_wide": 1 if interleaved else kernel[1],
        "tap_high": dilation[0], "tap_wide": dilation[1] * place, "chunks": chunks, "line": line,
        "out_height": high, "out_width": wide, "out_channels": out_channels, "tiles": high * wide,
        "groups": groups, "group_channels": out_channels // groups, "group_outputs": in_group,
        "outputs": outputs, "output_step": cut.output_step, "scratch_stride": own,
        "low": low, "high": high_bits, "silu": activation == "silu",
        "x_half": types.x, "y_half": types.y, "r_half": types.residual,
    }  # fmt: skip
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    units = image_blocks * row_blocks * -(-outputs // cut.output_step)
    worth = max(1, shape[0] * shape[2] * shape[3] * channels * kernel[0] * kernel[1] * out_channels // _THREAD_MACS)
    used = min(threads, units, worth)
    kind = torch.bfloat16 if types.y else torch.float32
    return Call(shape, bytes(context), tuple(kernels(algorithm).tasks.values()), used, used * own, 0, True, kind)
