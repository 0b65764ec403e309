"""Rows against the convolution that reads them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tersenet.ops.rows import conv_rows, draw_positions, output_rows


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    per_image=st.sampled_from([1, 4, 10_000, None]),
)
def test_rows_times_weight_are_the_convolution(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    per_image: int | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 7, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 4, *kernel, generator=generator, dtype=torch.float64)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    positions = None
    if per_image is not None:
        positions = draw_positions(len(x), y.shape[2] * y.shape[3], per_image, generator)
    read = conv_rows(x, kernel, positions, stride=stride, padding=padding, dilation=dilation)
    torch.testing.assert_close(read @ weight.flatten(1).T, output_rows(y, positions))


def test_positions_are_seeded_different_between_images_and_never_twice() -> None:
    drawn = draw_positions(50, 49, 10, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, draw_positions(50, 49, 10, torch.Generator().manual_seed(3)))
    assert not torch.equal(drawn, draw_positions(50, 49, 10, torch.Generator().manual_seed(4)))
    assert all(len(set(image)) == 10 for image in drawn.tolist())
    assert drawn.unique().numel() == 49
    assert draw_positions(2, 4, 4, torch.Generator()).tolist() == [[0, 1, 2, 3]] * 2
