"""What a convolution's kernel covers at each output pixel, copied to where the product reads it in order, in IR."""

from __future__ import annotations

from tersenet.kernels.context import ContextReader
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Module


def copy_function(module: Module, isa: Isa) -> None:
    """`copy`: V of the `%rows` pixels from `%pixel` on: each row of the kernel is a segment, whose pixels lie side by
    side in the image. What is outside the image, and what fills up a segment's last vector, is zero."""
    f = module.function("copy", "ptr %context, ptr noalias %v, i64 %pixel, i64 %rows")
    c = ContextReader(
        f, "x", "x_image", "x_row", "out_height", "out_width", "channels", "height", "width", "pad_top", "pad_left",
        "size_high", "size_wide", "step_high", "step_wide", "vectors", "x_column",
    )  # fmt: skip
    width = isa.width
    floats = f.mul(c["size_wide"], c["channels"])
    whole, left_over = f.divmod(floats, width)
    tail = f.lanes(left_over)
    step = isa.rows * width
    with f.loop("%rows") as pixel:
        line, column = f.divmod(f.add("%pixel", pixel.index), c["out_width"])
        image, line = f.divmod(line, c["out_height"])
        left = f.sub(f.mul(column, c["step_wide"]), c["pad_left"])
        top = f.sub(f.mul(line, c["step_high"]), c["pad_top"])
        x = f.offset(c["x"], f.add(f.mul(image, c["x_image"]), f.mul(left, c["x_column"])))
        own = f.offset("%v", f.mul(pixel.index, width))
        # The floats of a segment that are in the image, in a row that is.
        begin = f.mul(f.maximum(f.sub("0", left), 0), c["channels"])
        end = f.mul(f.minimum(c["size_wide"], f.sub(c["width"], left)), c["channels"])
        is_wide = f.both(f.compare("eq", begin, 0), f.compare("eq", end, floats))
        with f.loop(c["size_high"]) as row:
            y = f.add(top, row.index)
            source = f.offset(x, f.mul(y, c["x_row"]))
            target = f.offset(own, f.mul(f.mul(row.index, c["vectors"]), step))
            is_high = f.compare("ult", y, c["height"])  # unsigned: what is negative is not inside either
            is_inside = f.both(is_high, is_wide)
            with f.when(is_inside):
                with f.loop(whole) as vector:
                    value = f.vload(f.offset(source, f.mul(vector.index, width)))
                    f.vstore(value, f.offset(target, f.mul(vector.index, step)), align=4 * width)
                with f.when(f.compare("sgt", left_over, 0)):
                    value = f.vload(f.offset(source, f.mul(whole, width)), tail)
                    f.vstore(value, f.offset(target, f.mul(whole, step)), align=4 * width)
            with f.when(f.op(f"xor i1 {is_inside}, true")):
                last = f.op(f"select i1 {is_high}, i64 {end}, i64 0")
                with f.loop(c["vectors"]) as vector:
                    place = f.mul(vector.index, width)
                    before = f.lanes(f.maximum(f.minimum(f.sub(begin, place), width), 0))
                    until = f.lanes(f.maximum(f.minimum(f.sub(last, place), width), 0))
                    kind = f"<{width} x i1>"
                    mask = f.op(f"select {kind} {before}, {kind} zeroinitializer, {kind} {until}")
                    value = f.vload(f.offset(source, place), mask)
                    f.vstore(value, f.offset(target, f.mul(vector.index, step)), align=4 * width)
