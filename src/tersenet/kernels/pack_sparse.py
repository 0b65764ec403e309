"""Pruned weights of the Winograd domain in the forms that the sparse product kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersenet.kernels.generate import POINTS, Algorithm
from tersenet.kernels.host import host
from tersenet.kernels.memory import settled
from tersenet.kernels.pack import check_domain
from tersenet.kernels.scattered import SLICE


@dataclass(frozen=True)
class SparsePacked:
    """What is left of a weight, tap by tap: in blocks, vector by vector of output channels; or single weights, by
    slices of input channels, in each output channel by output channel.

    `weight` (entries, width) holds one input channel's weights for one vector, `list` (entries,) int32 that channel,
    and `starts` (taps vectors + 1,) int64 the first entry of each tap and vector. Of single weights: `weight`
    (entries,), `list` the input channel times width, `starts` (taps slices C_out + 1,). `bias` as of a dense one.
    """

    algorithm: Algorithm
    weight: Tensor
    list: Tensor
    starts: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int

    @property
    def density(self) -> float:
        """Share that is left, in all taps: of the weights, or of the blocks of one input channel by `width` outputs."""
        algorithm = self.algorithm
        width = 1 if algorithm.weight == "scattered" else algorithm.isa.width
        return len(self.list) / (algorithm.t**2 * self.in_channels * -(-self.out_channels // width))


def pack_sparse(
    weight: Tensor,
    bias: Tensor | None = None,
    m: int = 4,
    isa: str | None = None,
    points: str = POINTS,
    relu: bool = False,
    kept: str = "sparse",
    threshold: float = 0.0,
) -> SparsePacked:
    """Pack a weight of the Winograd domain: only what is not zero.

    Args:
        weight: (t t, C_in, C_out) with t = m + 2, tap = t * row + column; pruned weights are zero.
        bias: (C_out,), or None.
        m: 2, 4 or 6.
        isa: A set of vector instructions that this processor has; the best by default.
        points: Of the transforms that the weight was trained with.
        relu: Whether the layer has its ReLU behind the input transform.
        kept: "sparse": in blocks of one input channel by a vector of output channels, which are kept whole;
            "scattered": single weights, for masks that leave hardly any block empty.
        threshold: What is no further than that from zero behind the input transform counts as zero.

    Raises:
        TersenetError: another shape, empty or not on the CPU; m or isa that is not offered.
    """
    algorithm = Algorithm(m, host().isa(isa), kept, points, relu, threshold)
    check_domain(weight, bias, algorithm)
    _, inputs, outputs = weight.shape
    weight = weight.detach().float()
    values, channels, starts = (_single if kept == "scattered" else in_blocks)(weight, algorithm.isa.width)
    block = algorithm.isa.channels
    both = torch.zeros(2, -(-outputs // block) * block, dtype=torch.float32, device="cpu")
    both[1] = 1
    if bias is not None:
        both[0, :outputs] = bias.detach()
    return SparsePacked(algorithm, settled(values), settled(channels.to(torch.int32)), starts, both, inputs, outputs)


def in_blocks(weight: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of a weight (taps, C_in, C_out): values (entries, width), input channels and starts."""
    blocks = pad(weight, (0, -weight.shape[2] % width)).unflatten(2, (-1, width)).transpose(1, 2)
    kept = (blocks != 0).any(3)
    return blocks[kept], kept.nonzero()[:, 2], _starts(kept.sum(2))


def _single(weight: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places of the input channels in V, and starts."""
    slices = pad(weight, (0, 0, 0, -weight.shape[1] % SLICE)).unflatten(1, (-1, SLICE)).transpose(2, 3)
    kept = slices != 0
    _, part, _, channel = kept.nonzero().unbind(1)
    return slices[kept], (part * SLICE + channel) * width, _starts(kept.sum(3))


def _starts(counts: Tensor) -> Tensor:
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts.flatten(), 0, out=starts[1:])
    return starts
