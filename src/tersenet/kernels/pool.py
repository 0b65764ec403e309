"""Max pooling in channels-last memory, in IR: torch's own also finds out where each maximum was.

A row of the output is a unit of work. As in torch, what is not a number is the maximum of its window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tersenet.kernels.bf16_values import BITS, load_floats, store_floats
from tersenet.kernels.blocks import TASK
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Loop, Module

POOL_TASKS = ("run_pool",)
_TOGETHER = 4  # vectors of channels that pass through a window together


@dataclass(frozen=True)
class Pool:
    """The code for one set of vector instructions; sizes are arguments. `half`: for bfloat16 images, with AMX only."""

    isa: Isa
    half: bool = False

    @property
    def name(self) -> str:
        return f"maxpool-{self.isa.name}{'-bf16' if self.half else ''}"


def generate_pool(algorithm: Pool) -> str:
    """The text of its module, with the one task `run_pool`."""
    isa = algorithm.isa
    bits = isa.width * 32
    module = Module(isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    f = module.function("run_pool", TASK, exported=True)
    c = ContextReader(
        f, "x", "x_image", "x_row", "x_column", "y", "y_image", "y_row", "y_column", "height", "width", "channels",
        "out_height", "out_width", "pad_top", "pad_left", "size_high", "size_wide", "step_high", "step_wide", "units",
    )  # fmt: skip
    together = _TOGETHER * isa.width
    kind = BITS if algorithm.half else "float"
    whole = f.mul(f.divmod(c["channels"], together)[0], together)
    with f.claims(c.address("next_product"), c["units"]) as unit:
        image, row = f.divmod(unit, c["out_height"])
        x = f.offset(c["x"], f.mul(image, c["x_image"]), kind)
        y = f.offset(c["y"], f.add(f.mul(image, c["y_image"]), f.mul(row, c["y_row"])), kind)
        rows = _window(f, row, c["step_high"], c["pad_top"], c["size_high"], c["height"])
        with f.loop(c["out_width"]) as column:
            columns = _window(f, column.index, c["step_wide"], c["pad_left"], c["size_wide"], c["width"])
            pixel = f.offset(y, f.mul(column.index, c["y_column"]), kind)
            with f.loop(whole, step=together) as channel:
                _maximum(f, c, x, pixel, rows, columns, channel, _TOGETHER, algorithm.half)
            with f.loop(c["channels"], start=whole, step=isa.width) as channel:
                lanes = f.lanes(f.sub(c["channels"], channel.index))
                _maximum(f, c, x, pixel, rows, columns, channel, 1, algorithm.half, lanes)
    return module.text()


def _window(f: Function, place: str, step: str, padding: str, size: str, length: str) -> tuple[str, str]:
    """The first pixel of a window along one axis, and the one behind its last, as far as they are in the image."""
    start = f.sub(f.mul(place, step), padding)
    return f.maximum(start, 0), f.minimum(f.add(start, size), length)


def _maximum(
    f: Function,
    c: ContextReader,
    x: str,
    y: str,
    rows: tuple[str, str],
    columns: tuple[str, str],
    channel: Loop,
    vectors: int,
    half: bool,
    lanes: str | None = None,
) -> None:
    """The largest values of a window, for some vectors of channels from `channel` on."""
    v, width = f.module.vector, f.module.width
    kind = BITS if half else "float"
    lowest = [(v, f.splat(-math.inf))] * vectors
    places = [f.add(channel.index, k * width) for k in range(vectors)]
    with f.loop(rows[1], start=rows[0], carry=lowest) as row:
        line = f.offset(x, f.mul(row.index, c["x_row"]), kind)
        with f.loop(columns[1], start=columns[0], carry=[(v, value) for value in row.values]) as column:
            pixel = f.offset(line, f.mul(column.index, c["x_column"]), kind)
            read = [load_floats(f, half, f.offset(pixel, place, kind), lanes) for place in places]
            column.next([f.vlarger(a, b) for a, b in zip(read, column.values, strict=True)])
        row.next(column.values)
    for value, place in zip(row.values, places, strict=True):
        store_floats(f, half, value, f.offset(y, place, kind), lanes)
