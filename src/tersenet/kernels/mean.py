"""The mean of each channel's image in channels-last memory, in IR: the last pool of most networks.

An image is a unit of work.
"""

from __future__ import annotations

from dataclasses import dataclass

from tersenet.kernels.bf16_values import BITS, load_floats, store_floats
from tersenet.kernels.blocks import TASK
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module

MEAN_TASKS = ("run_mean",)
_TOGETHER = 4  # vectors of channels that pass over the image together


@dataclass(frozen=True)
class Mean:
    """The code for one set of vector instructions; sizes are arguments. `half`: for bfloat16 images, with AMX only."""

    isa: Isa
    half: bool = False

    @property
    def name(self) -> str:
        return f"mean-{self.isa.name}{'-bf16' if self.half else ''}"


def generate_mean(algorithm: Mean) -> str:
    """The text of its module, with the one task `run_mean`."""
    isa, kind = algorithm.isa, BITS if algorithm.half else "float"
    bits = isa.width * 32
    module = Module(isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    f = module.function("run_mean", TASK, exported=True)
    c = ContextReader(f, "x", "x_image", "y", "channels", "units")
    together = _TOGETHER * isa.width
    whole = f.mul(f.divmod(c["channels"], together)[0], together)
    with f.claims(c.address("next_product"), c["units"]) as image:
        x = f.offset(c["x"], f.mul(image, c["x_image"]), kind)
        y = f.offset(c["y"], f.mul(image, c["channels"]), kind)
        with f.loop(whole, step=together) as channel:
            _mean(f, x, y, channel.index, _TOGETHER, algorithm)
        with f.loop(c["channels"], start=whole, step=isa.width) as channel:
            _mean(f, x, y, channel.index, 1, algorithm, f.lanes(f.sub(c["channels"], channel.index)))
    return module.text()


def _mean(f: Function, x: str, y: str, channel: str, vectors: int, algorithm: Mean, lanes: str | None = None) -> None:
    """Of some vectors of channels from `channel` on."""
    c = ContextReader(f, "height", "width", "x_row", "x_column", "low")
    v, half = f.module.vector, algorithm.half
    kind = BITS if half else "float"
    places = [f.add(channel, k * algorithm.isa.width) for k in range(vectors)]
    with f.loop(c["height"], carry=[(v, "zeroinitializer")] * vectors) as row:
        line = f.offset(x, f.mul(row.index, c["x_row"]), kind)
        with f.loop(c["width"], carry=[(v, value) for value in row.values]) as column:
            pixel = f.offset(line, f.mul(column.index, c["x_column"]), kind)
            read = [load_floats(f, half, f.offset(pixel, place, kind), lanes) for place in places]
            column.next([f.vadd(a, b) for a, b in zip(column.values, read, strict=True)])
        row.next(column.values)
    bits = f.op(f"trunc i64 {c['low']} to i32")
    share = f.spread(f.op(f"bitcast i32 {bits} to float"))
    for value, place in zip(row.values, places, strict=True):
        store_floats(f, half, f.vmul(value, share), f.offset(y, place, kind), lanes)
