"""The Triton kernels of Winograd's convolution: input transform, products, output transform, and all three in one.

Images are in channels-last memory. V is (taps, tiles, C_in) and M (taps, tiles, C_out), for a stretch of all tiles that
begins at `first`. Padded channels are zero in V and in the weight, so that products need no masks.
"""
# pyright: reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

from tersenet.kernels.gpu.host import interpreted
from tersenet.kernels.gpu.transforms import added, combined, tl, transformed, triton, written

_CHANGING = ["first", "tiles", "size"]  # values that no code is made for


def _configurations(*blocks: tuple[int, ...], names: str, tested: tuple[int, ...]) -> list[object]:
    """Each is the sizes of its blocks, then warps and pipeline stages. The interpreter can't time any: it takes
    `tested`, whose few programs are quickly gone through."""
    found = [(*tested, 1, 1)] if interpreted() else blocks
    return [triton.Config(dict(zip(names.split(), one[:-2], strict=True)), one[-2], one[-1]) for one in found]


def _fitting(configurations, arguments, **others):
    """Those whose steps divide the padded channels."""
    return [one for one in configurations if arguments["padded"] % one.kwargs["BLOCK_C"] == 0]


@triton.autotune(
    configs=_configurations((4, 32, 4, 1), (8, 32, 4, 1), (32, 8, 4, 1), names="BLOCK_P BLOCK_C", tested=(64, 64)),
    key=["channels", "size", "v_tile", "TILE"],
)
@triton.jit(do_not_specialize=_CHANGING)
def transform_input(
    x, v, first, tiles, channels, padded, height, width, tiles_high, tiles_wide, pad_top, pad_left,
    x_image, x_row, x_column, v_tap, v_tile, v_channel, size,
    BT: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """V = SCALE B^T d B, or its ReLU. Programs: blocks of tiles, blocks of padded channels."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = transformed(
        x, first + p, p < tiles, c, channels, height, width, tiles_high, tiles_wide, pad_top, pad_left,
        x_image, x_row, x_column, BT, TILE, RELU,
    )  # fmt: skip
    at = v + p[:, None] * v_tile + c[None, :] * v_channel
    inside = (p < tiles)[:, None] & (c < padded)[None, :]
    for j in tl.static_range(len(BT)):
        for i in tl.static_range(len(BT)):
            value = (taps[j * len(BT) + i] * SCALE).to(v.dtype.element_ty)
            tl.store(at + (i * len(BT) + j) * v_tap, value, mask=inside)


@triton.autotune(
    configs=_configurations(
        (32, 32, 32, 4, 3), (64, 64, 32, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3),
        names="BLOCK_P BLOCK_K BLOCK_C", tested=(64, 64, 32),
    ),
    key=["padded", "outputs", "size", "PRECISION"],
    prune_configs_by={"early_config_prune": _fitting},
)  # fmt: skip
@triton.jit(do_not_specialize=_CHANGING)
def multiply(
    v, u, m, tiles, padded, outputs, size, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """M = V U, tap by tap. Programs: blocks of tiles by blocks of outputs, taps."""
    across = tl.cdiv(outputs, BLOCK_K)
    p = tl.program_id(0) // across * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    tap = tl.program_id(1).to(tl.int64)
    # Beyond the end others are read again, and not written.
    left = v + tap * tiles * padded + (p % tiles)[:, None] * padded + c[None, :]
    right = u + tap * padded * outputs + c[:, None] * outputs + (k % outputs)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for _ in range(0, padded, BLOCK_C):
        total = added(tl.load(left), tl.load(right), total, PRECISION)
        left += BLOCK_C
        right += BLOCK_C * outputs
    at = m + tap * tiles * outputs + p[:, None] * outputs + k[None, :]
    tl.store(at, total, mask=(p < tiles)[:, None] & (k < outputs)[None, :])


@triton.autotune(
    configs=_configurations((64, 16, 4, 3), (128, 16, 4, 3), (128, 32, 4, 3), names="BLOCK_P BLOCK_E", tested=(64, 64)),
    key=["channels", "outputs", "size", "PRECISION"],
)
@triton.jit(do_not_specialize=[*_CHANGING, "entries"])
def multiply_kept(
    v, weight, channels_kept, starts, m, tiles, pitch, channels, outputs, entries, size,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """M = V W for a pruned weight: of each tap and block of WIDTH outputs only the input channels that are kept.

    `weight` (entries, WIDTH) and `channels_kept` (entries,) in the order of `starts` (taps blocks + 1,); V is (taps,
    C_in, pitch), so that a channel's tiles lie together; behind them there is room for a whole block. Programs: blocks
    of tiles, blocks of outputs, taps.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, WIDTH)
    tap = tl.program_id(2).to(tl.int64)
    row = tap * tl.num_programs(1) + tl.program_id(1)
    # Whatever the tables hold, nothing outside of them, or of V, is read.
    begin = tl.maximum(tl.load(starts + row), 0)
    end = tl.minimum(tl.load(starts + row + 1), entries)
    source = v + tap * channels * pitch + p[:, None]
    total = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    for entry in range(begin, end, BLOCK_E):
        e = entry + tl.arange(0, BLOCK_E)
        channel = tl.load(channels_kept + e, mask=e < end, other=-1)
        kept = (channel >= 0) & (channel < channels)
        left = tl.load(source + channel[None, :] * pitch, mask=kept[None, :], other=0.0)
        right = tl.load(weight + e[:, None] * WIDTH + k[None, :], mask=kept[:, None], other=0.0)
        total = added(left, right, total, PRECISION)
    k += tl.program_id(1) * WIDTH
    at = m + tap * tiles * outputs + p[:, None] * outputs + k[None, :]
    tl.store(at, total, mask=(p < tiles)[:, None] & (k < outputs)[None, :])


@triton.autotune(
    configs=_configurations((4, 32, 4, 1), (8, 32, 4, 1), names="BLOCK_P BLOCK_K", tested=(64, 64)),
    key=["channels", "size", "AT", "RESIDUAL"],
)
@triton.jit(do_not_specialize=_CHANGING)
def transform_output(
    m, y, table, residual, first, tiles, channels, padded, out_height, out_width, tiles_high, tiles_wide,
    y_image, y_row, y_column, r_image, r_row, r_column, size,
    AT: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """activation(factor A^T M A + bias + residual). Programs: blocks of tiles, blocks of output channels."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = m + p[:, None] * padded + k[None, :]
    inside = (p < tiles)[:, None] & (k < channels)[None, :]
    rows = ()
    for i in tl.static_range(len(AT) + 2):
        across = ()
        for j in tl.static_range(len(AT) + 2):
            across += (tl.load(at + (i * (len(AT) + 2) + j) * tiles * padded, mask=inside, other=0.0),)
        for j in tl.static_range(len(AT)):
            rows += (combined(across, AT, j),)
    written(
        rows, y, table, residual, first + p, p < tiles, k, channels, padded, out_height, out_width,
        tiles_high, tiles_wide, y_image, y_row, y_column, r_image, r_row, r_column, AT, RESIDUAL, ACTIVATION,
    )  # fmt: skip


@triton.autotune(
    configs=_configurations(
        (16, 32, 16, 4, 2),
        (64, 16, 16, 8, 1),
        (64, 32, 16, 8, 2),
        names="BLOCK_P BLOCK_K BLOCK_C",
        tested=(64, 64, 32),
    ),
    key=["padded", "outputs", "size", "PRECISION"],
)
@triton.jit(do_not_specialize=_CHANGING)
def convolve(
    x, u, y, table, residual, tiles, in_channels, padded, out_channels, outputs, height, width, out_height, out_width,
    tiles_high, tiles_wide, pad_top, pad_left, x_image, x_row, x_column, y_image, y_row, y_column,
    r_image, r_row, r_column, size,
    AT: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The whole convolution: all taps of a block are summed in registers, and neither V nor M is in memory. V is made
    again for each block of outputs. Programs: blocks of tiles by blocks of outputs."""
    across = tl.cdiv(outputs, BLOCK_K)
    p = tl.program_id(0) // across * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    totals = ()
    for _ in tl.static_range(len(BT) * len(BT)):
        totals += (tl.zeros((BLOCK_P, BLOCK_K), tl.float32),)
    for begin in range(0, padded, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        taps = transformed(
            x, p, p < tiles, c, in_channels, height, width, tiles_high, tiles_wide, pad_top, pad_left,
            x_image, x_row, x_column, BT, len(AT), RELU,
        )  # fmt: skip
        weights = u + c[:, None] * outputs + (k % outputs)[None, :]
        sums = ()
        for tap in tl.static_range(len(BT) * len(BT)):
            left = (taps[tap % len(BT) * len(BT) + tap // len(BT)] * SCALE).to(u.dtype.element_ty)
            right = tl.load(weights + tap * padded * outputs)
            sums += (added(left, right, totals[tap], PRECISION),)
        totals = sums
    rows = ()
    for i in tl.static_range(len(BT)):
        line = ()
        for j in tl.static_range(len(BT)):
            line += (totals[i * len(BT) + j],)
        for j in tl.static_range(len(AT)):
            rows += (combined(line, AT, j),)
    written(
        rows, y, table, residual, p, p < tiles, k, out_channels, outputs, out_height, out_width,
        tiles_high, tiles_wide, y_image, y_row, y_column, r_image, r_row, r_column, AT, RESIDUAL, ACTIVATION,
    )  # fmt: skip
