"""A layer among wider channels: gather before it, constants and scatter behind it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError


class ChannelAdapter(nn.Module):
    """`scatter(inner(gather(x)) + taps)`.

    gather: the channels of the input that `inner` reads.
    taps: (C_out, kH, kW), for a linear layer (C_out,): what removed input channels of constant value still contribute
        through each tap of a zero-padded convolution. Inside the image their sum is a bias; at the border only the taps
        that lie inside count, so that the result is exact at every size. Source: Soft Filter Pruning, spec. 1.1.5 (the
        reference drops this term and differs).
    scatter: where the output's channels stand among `width`; the others hold `constant`, one value each.

    Shapes: (N, C_in, H, W) -> (N, width or C_out, H', W'); around a linear layer the channels are the last axis.
    """

    gather: Tensor | None
    scatter: Tensor | None
    constant: Tensor | None
    taps: Tensor | None

    def __init__(
        self,
        inner: nn.Module,
        gather: tuple[int, ...] | None = None,
        scatter: tuple[int, ...] | None = None,
        width: int | None = None,
        taps: bool = False,
    ) -> None:
        super().__init__()
        if (scatter is None) != (width is None) or (scatter and width is not None and scatter[-1] >= width):
            raise GraphError(f"an adapter's scatter needs a width (={width}) above its last index")
        if taps and not isinstance(inner, (*_CONVOLUTIONS, nn.Linear)):
            raise GraphError(f"an adapter's taps belong to a convolution or linear layer, not {type(inner).__name__}")
        self.inner = inner
        # The indices are part of the architecture, so they come from the edit and not from the state dict.
        self.register_buffer("gather", _index(gather), persistent=False)
        self.register_buffer("scatter", _index(scatter), persistent=False)
        self.register_buffer("constant", None if width is None else torch.zeros(width, device="cpu"))
        self.register_buffer("taps", torch.zeros(_taps_shape(inner), device="cpu") if taps else None)
        # The last border map, with what it was made from: it costs a dozen small operators to make.
        self._map: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        """What the layer has, such as `weight` or `stride`, is found here too: forward may have asked the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("inner")
            if inner is None or name.startswith("_"):
                raise
            return getattr(inner, name)

    def forward(self, x: Tensor) -> Tensor:
        axis = -1 if isinstance(self.inner, nn.Linear) else 1
        if self.gather is not None:
            x = select_channels(x, axis, self.gather)
        y = self.inner(x)
        if self.taps is not None:
            # In place: a convolution's output is nobody else's, and its gradient does not need it.
            y = y.add_(self.taps if axis == -1 else self._border_map(self.taps, x, y))
        if self.scatter is None or self.constant is None:
            return y
        return _place(y, axis, self.scatter, self.constant.to(y.dtype))

    def _border_map(self, taps: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.border_map(x.shape[2:], y.shape[2:]).to(y.dtype)
        # Inference tensors have no version; `_load_from_state_dict` forgets the map for them.
        version = None if taps.is_inference() else taps._version
        key = (x.shape[2:], y.dtype, y.device, version, _nhwc(y, 1))
        if self._map is None or self._map[0] != key or self._map[1] is not taps:
            with torch.inference_mode(False):
                made = self.border_map(x.shape[2:], y.shape[2:]).to(y.dtype)[None]
                nhwc = _nhwc(y, 1)
                self._map = (key, taps, made.contiguous(memory_format=torch.channels_last) if nhwc else made)
        return self._map[2]

    def forget(self) -> None:
        """Make the border map anew in the next pass: whoever records that pass has to see it made."""
        self._map = None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._map = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._map = None
        super()._load_from_state_dict(*args, **kwargs)

    def border_map(self, size: torch.Size, out: torch.Size) -> Tensor:
        """(C_out, H', W'): the sum of the taps that lie inside an input of `size`, at every output position."""
        conv, total = self.inner, self.taps
        if total is None or not isinstance(conv, _CONVOLUTIONS):
            raise GraphError("this adapter has no taps")
        padding = conv.padding if not isinstance(conv.padding, str) else _same_padding(conv)
        for axis in range(len(size)):
            at = torch.arange(out[axis], device=total.device)[:, None] * conv.stride[axis] - int(padding[axis])
            at = at + torch.arange(conv.kernel_size[axis], device=total.device) * conv.dilation[axis]
            inside = ((at >= 0) & (at < size[axis])).to(total.dtype)
            # (C_out, done axes, taps of this axis, ...) -> the same with output positions in place of the taps.
            shape = [1] * (1 + axis) + [*inside.shape] + [1] * (len(size) - axis - 1)
            total = (total.unsqueeze(1 + axis) * inside.view(shape)).sum(2 + axis)
        return total


def _nhwc(x: Tensor, axis: int) -> bool:
    return axis == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def select_channels(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`index_select` that keeps NHWC memory order: the next convolution would pay for turning it back."""
    if not _nhwc(x, axis):
        return x.index_select(axis, index)
    # Ten and more times faster on a matrix than along the last of four axes.
    N, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, C).index_select(1, index)
    return pixels.view(N, H, W, len(index)).permute(0, 3, 1, 2)


def _place(y: Tensor, axis: int, index: Tensor, constant: Tensor) -> Tensor:
    """`y` at the channels `index` among constants, in the memory order of `y`."""
    if _nhwc(y, axis):
        full = constant.expand(y.shape[0], *y.shape[2:], len(constant)).clone()
        return full.index_copy_(3, index, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    shape = [*y.shape]
    shape[axis] = len(constant)
    full = constant.view(-1, *[1] * (y.dim() - 2)) if axis == 1 else constant
    return full.expand(shape).clone().index_copy_(axis, index, y)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _taps_shape(inner: nn.Module) -> tuple[int, ...]:
    if isinstance(inner, _CONVOLUTIONS):
        return (inner.out_channels, *inner.kernel_size)
    return (inner.out_features,) if isinstance(inner, nn.Linear) else ()


def _index(values: tuple[int, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.long, device="cpu")


def _same_padding(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    return [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
