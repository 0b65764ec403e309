"""The passes of a Winograd layer between an image and the taps of its tiles, in IR: what training does around products.

A pass applies one small matrix M to both axes of a tile. `gather` reads the pixels d of every tile and writes the taps
M d M^T; `scatter` reads the taps and writes pixels, or adds them where tiles overlap. The image is channels-last, taps
are (taps, tiles, channels). With M = B^T and A the image's tiles and the result's gradient are gathered; with A^T and B
the result and the image's gradient are scattered.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tersenet.kernels.blocks import TASK
from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Function, Module
from tersenet.kernels.linear import apply
from tersenet.ops.cook_toom import Matrix

TILE_TASKS = ("run_tiles",)
_POINTERS = "ptr %context, ptr %x, ptr %y, ptr %r"


@dataclass(frozen=True)
class TilePass:
    """The code of one pass; sizes are arguments.

    matrix: M, applied to both axes.
    step: pixels from one tile to the next.
    relu: of a gathering pass, the taps are cut off at zero; of a scattering one, taps count as zero where those of
        another tensor are zero or below: the gradient of that.
    """

    isa: Isa
    kind: Literal["gather", "scatter"]
    matrix: Matrix
    step: int
    relu: bool = False

    @property
    def name(self) -> str:
        digest = hashlib.sha256(repr((self.matrix, self.step, self.relu)).encode()).hexdigest()[:16]
        return f"tiles-{self.kind}-{digest}-{self.isa.name}"


def generate_tiles(algorithm: TilePass) -> str:
    """The text of its module, with the one task `run_tiles`.

    In the context `x` is the image, `y` the taps, `v_tap` floats from one tap to the next, and `r`, of the same layout,
    what a scattering pass with `relu` asks. An image is a unit of work.
    """
    isa = algorithm.isa
    bits = isa.width * 32
    module = Module(isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    _tile(module, algorithm, careful=False)
    _tile(module, algorithm, careful=True)
    f = module.function("run_tiles", TASK, exported=True)
    c = ContextReader(
        f, "x", "x_image", "x_row", "x_column", "y", "r", "height", "width", "channels", "pad_top", "pad_left",
        "tiles_high", "tiles_wide", "units",
    )  # fmt: skip
    length = len(algorithm.matrix if algorithm.kind == "scatter" else algorithm.matrix[0])
    with f.claims(c.address("next_product"), c["units"]) as image, f.loop(c["tiles_high"]) as row:
        top = f.sub(f.mul(row.index, algorithm.step), c["pad_top"])
        line = f.add(f.mul(image, c["x_image"]), f.mul(top, c["x_row"]))
        before = f.mul(f.add(f.mul(image, c["tiles_high"]), row.index), c["tiles_wide"])
        high = _fits(f, top, c["height"], length)
        with f.loop(c["tiles_wide"]) as column:
            left = f.sub(f.mul(column.index, algorithm.step), c["pad_left"])
            inside = f.both(high, _fits(f, left, c["width"], length))
            first = f.add(line, f.mul(left, c["x_column"]))
            taps = f.mul(f.add(before, column.index), c["channels"])
            with f.loop(c["channels"], step=isa.width) as channel:
                pixel, tap = f.add(first, channel.index), f.add(taps, channel.index)
                left_over = f.sub(c["channels"], channel.index)
                plain = f.both(inside, f.compare("sge", left_over, isa.width))
                pointers = ["ptr %context", f"ptr {f.offset(c['x'], pixel)}"]
                pointers += [f"ptr {f.offset(c[name], tap)}" for name in "yr"]
                place = [f"i64 {top}", f"i64 {left}", f"i64 {left_over}"]
                _either(f, plain, lambda p=pointers: f.call("tile", *p),
                        lambda p=pointers, q=place: f.call("careful_tile", *p, *q))  # fmt: skip
    return module.text()


def _tile(module: Module, algorithm: TilePass, careful: bool) -> None:
    """One tile and one vector of channels. `careful`: pixels outside the image, and channels from `%channels` on, are
    neither read nor written, and count as zero."""
    matrix, scatters = algorithm.matrix, algorithm.kind == "scatter"
    given, made = range(len(matrix[0])), range(len(matrix))
    if careful:
        f = module.function("careful_tile", f"{_POINTERS}, i64 %top, i64 %left, i64 %channels")
    else:
        f = module.function("tile", _POINTERS)
    c = ContextReader(f, "x_row", "x_column", "v_tap", "height", "width")
    pixels = made if scatters else given
    lanes = f.lanes("%channels") if careful else None
    masks: dict[tuple[int, int], str] = {}
    if lanes is not None:
        rows = [f.masked(lanes, _inside(f, f.add("%top", i), c["height"])) for i in pixels]
        columns = [_inside(f, f.add("%left", j), c["width"]) for j in pixels]
        masks = {(i, j): f.masked(rows[i], columns[j]) for i, j in itertools.product(pixels, pixels)}

    def pixel(i: int, j: int) -> str:
        return f.offset("%x", f.add(f.mul(c["x_row"], i), f.mul(c["x_column"], j)))

    def tap(name: str, i: int, j: int) -> str:
        return f.offset(name, f.mul(c["v_tap"], i * len(taps) + j))

    taps = given if scatters else made

    def read(i: int, j: int) -> str:
        if not scatters:
            return f.vload(pixel(i, j), masks.get((i, j)))
        value = f.vload(tap("%y", i, j), lanes)
        return f.vgated(value, f.vload(tap("%r", i, j), lanes)) if algorithm.relu else value

    def write(i: int, j: int, value: str) -> None:
        if not scatters:
            f.vstore(f.vpositive(value) if algorithm.relu else value, tap("%y", i, j), lanes)
            return
        mask = masks.get((i, j))
        if len(made) > algorithm.step:
            value = f.vadd(f.vload(pixel(i, j), mask), value)
        f.vstore(value, pixel(i, j), mask)

    half = [apply(f, matrix, [read(i, j) for i in given]) for j in given]
    for i in made:
        for j, value in enumerate(apply(f, matrix, [column[i] for column in half])):
            write(i, j, value)


def _either(f: Function, condition: str, yes: Callable[[], None], no: Callable[[], None]) -> None:
    f.switch(f.op(f"zext i1 {condition} to i64"), {1: yes, 0: no})


def _fits(f: Function, start: str, size: str, length: int) -> str:
    """Whether `length` pixels from `start` on are inside."""
    return f.both(f.compare("sge", start, 0), f.compare("sle", f.add(start, length), size))


def _inside(f: Function, place: str, size: str) -> str:
    """Whether a row or column is in the image."""
    return f.compare("ult", place, size)  # unsigned: what is negative is not inside either
