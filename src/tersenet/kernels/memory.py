"""Memory in huge pages, where the system has them.

A tile's taps lie far from each other, in more small pages than the processor knows the addresses of; and a packed
weight is read once and in order, which stops at the end of each page: from small pages it comes half as fast.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros that begins at a huge page and has its last one for itself."""
    size = prod(shape) * dtype.itemsize
    if _ADVICE is None or not size:
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu")
    # Private: huge pages of shared memory are another setting of the system, and mostly off. Where a huge page begins
    # is found out behind; what is not touched takes no memory.
    area = mmap.mmap(-1, (-(-size // PAGE_BYTES) + 1) * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        area.madvise(_ADVICE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE_BYTES
    return whole[start : start + size].view(dtype).view(tuple(shape))


def room(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros, in huge pages if it fills at least half of one."""
    large = prod(shape) * dtype.itemsize >= PAGE_BYTES // 2
    return zeros(shape, dtype) if large else torch.zeros(tuple(shape), dtype=dtype, device="cpu")


def settled(tensor: Tensor) -> Tensor:
    """The same values in huge pages, if they fill at least half of one; contiguous in any case."""
    if _ADVICE is None or tensor.nbytes < PAGE_BYTES // 2:
        return tensor.contiguous()
    return zeros(tensor.shape, tensor.dtype).copy_(tensor)
