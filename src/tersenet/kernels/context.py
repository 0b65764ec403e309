"""What generated code is told about one call: a table of 64-bit numbers, in the order of `FIELDS`."""

from __future__ import annotations

import ctypes

from tersenet.kernels.ir import Function

# Strides are in floats, sizes in elements. x is the input, y the output, r the residual that is added to the output.
FIELDS = (
    "x x_image x_row x_column y y_image y_row y_column r r_image r_row r_column "
    "weight bias list starts bias_scale scratch scratch_stride shared "
    "height width channels out_height out_width out_channels pad_top pad_left "
    "tiles tiles_high tiles_wide block block_count v_tap v_vector m_tap m_vector m_block v_block "
    "vectors quads quad_step outputs output_step groups group_count slices low high silu "
    "size_high size_wide step_high step_wide units copy_high copy_wide tap_high "
    "tap_wide line halo group_channels group_outputs v_low chunks "
    "taps initial wide factor_tap factors plane_rows plane_chunk plane_phase plane_image "
    "x_scale x_reciprocal x_least x_most z_scale z_reciprocal z_least z_most "
    "v_least v_most s_least s_most y_least y_most "
    "images block_rows phases copy_left copy_count copy_first copy_step interleaved direct x_half y_half r_half "
    "v_row v_phase v_image v_step v_own v_total piece "
    "next_input next_product next_slot"
).split()

INDEX = {name: place for place, name in enumerate(FIELDS)}

Context = ctypes.c_int64 * len(FIELDS)


class ContextReader:
    """Loads fields of the context that a function gets as `%context`; each once, where it is first asked for."""

    def __init__(self, function: Function, *names: str) -> None:
        self._function = function
        self._loaded = {name: self._load(name) for name in names}

    def __getitem__(self, name: str) -> str:
        return self._loaded[name]

    def address(self, name: str) -> str:
        """Where the field is."""
        return self._function.offset("%context", INDEX[name], "i64")

    def _load(self, name: str) -> str:
        kind = "ptr" if name in ("x", "y", "r", "weight", "bias", "list", "starts", "scratch", "shared") else "i64"
        return self._function.load(kind, self.address(name), 8)
