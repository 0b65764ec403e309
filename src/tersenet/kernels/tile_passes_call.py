"""One call of a pass between an image and the taps of its tiles: sizes, threads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.host import Isa, host
from tersenet.kernels.threads import available
from tersenet.kernels.tile_passes import TilePass
from tersenet.kernels.winograd import Call, Tables

Pair = tuple[int, int]
_NO_TABLES = Tables()
_LINE = 16  # floats of a cache line


@functools.cache
def best_isa() -> Isa | None:
    """What the passes run on here; None where there are no generated kernels."""
    try:
        return host().isa()
    except TersenetError:
        return None


def empty_taps(taps: int, tiles: int, channels: int) -> Tensor:
    """(taps, tiles, channels), not set. One line lies between taps: at strides of a power of two they would all meet in
    the same set of the cache."""
    return torch.empty(taps, tiles * channels + _LINE)[:, : tiles * channels].view(taps, tiles, channels)


def tile_pass(
    algorithm: TilePass, image: Tensor, taps: Tensor, padding: Pair, tiles: Pair, gate: Tensor | None = None
) -> None:
    """Between `image` (N, C, H, W), float32 in channels-last memory, and `taps` of `empty_taps`; see `TilePass`.

    Args:
        padding: rows above and columns left of the image.
        tiles: of one image, along both axes.
        gate: of a scattering pass with ReLU, the taps whose sign decides, in the same memory order as `taps`.
    """
    call = _call(algorithm, image.shape, image.stride(), taps.stride(0), padding, tiles, available())
    call.run(image, _NO_TABLES, gate, taps)


@functools.lru_cache(maxsize=1024)
def _call(
    algorithm: TilePass,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    tap: int,
    padding: Pair,
    tiles: Pair,
    threads: int,
) -> Call:
    images, channels, height, width = shape
    fields = {
        "x_image": strides[0], "x_row": strides[2], "x_column": strides[3], "height": height, "width": width,
        "channels": channels, "pad_top": padding[0], "pad_left": padding[1],
        "tiles_high": tiles[0], "tiles_wide": tiles[1], "v_tap": tap, "units": images,
    }  # fmt: skip
    context = bytes(Context(*(fields.get(name, 0) for name in FIELDS)))
    return Call((0, 0, 0, 0), context, tuple(kernels(algorithm).tasks.values()), min(threads, images), 0, 0)
