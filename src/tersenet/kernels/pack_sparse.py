"""Pruned weights of the Winograd domain in the form that the sparse product kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.generate import POINTS, Algorithm
from tersenet.kernels.host import host


@dataclass(frozen=True)
class SparsePacked:
    """What is left of a weight, vector by vector of output channels, in each of them tap by tap.

    `weight` (entries, width) holds one input channel's weights for one vector, `list` (entries,) int32 that channel,
    and `starts` (vectors taps + 1,) int64 the first entry of each vector and tap. `bias` as of a dense one.
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
        """Share of the blocks of one input channel by `width` output channels that are left, in all taps."""
        return len(self.list) / max(1, (len(self.starts) - 1) * self.in_channels)


def pack_sparse(
    weight: Tensor,
    bias: Tensor | None = None,
    m: int = 4,
    isa: str | None = None,
    points: str = POINTS,
    relu: bool = False,
) -> SparsePacked:
    """Pack a weight of the Winograd domain: what is not zero, in blocks of one input channel by a vector of outputs.

    Args:
        weight: (t t, C_in, C_out) with t = m + 2, tap = t * row + column; pruned weights are zero.
        bias: (C_out,), or None.
        m: 2, 4 or 6.
        isa: A set of vector instructions that this processor has; the best by default.
        points: Of the transforms that the weight was trained with.
        relu: Whether the layer has its ReLU behind the input transform.

    Raises:
        TersenetError: another shape, empty or not on the CPU; m or isa that is not offered.
    """
    algorithm = Algorithm(m, host().isa(isa), "sparse", points, relu)
    if weight.ndim != 3 or weight.shape[0] != algorithm.t**2 or 0 in weight.shape or not weight.is_floating_point():
        raise TersenetError(
            f"weight (={weight.dtype} {tuple(weight.shape)}) must be floating and of shape ({algorithm.t**2}, C_in, "
            f"C_out) for F({m}x{m}, 3x3)"
        )
    taps, inputs, outputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise TersenetError(f"bias (={tuple(bias.shape)}) must have one value for each of {outputs} output channels")
    if weight.device.type != "cpu":
        raise TersenetError(f"weight is on {weight.device}; the CPU kernels take CPU tensors")
    width, block = algorithm.isa.width, algorithm.isa.channels
    vectors = -(-outputs // width)
    padded = torch.zeros(taps, inputs, vectors * width, dtype=torch.float32, device="cpu")
    padded[..., :outputs] = weight.detach()
    blocks = padded.view(taps, inputs, vectors, width).permute(2, 0, 1, 3)
    kept = (blocks != 0).any(3)
    starts = torch.zeros(vectors * taps + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(kept.sum(2).flatten(), 0, out=starts[1:])
    both = torch.zeros(2, -(-outputs // block) * block, dtype=torch.float32, device="cpu")
    both[1] = 1
    if bias is not None:
        both[0, :outputs] = bias.detach()
    channels = kept.nonzero()[:, 2].to(torch.int32)
    return SparsePacked(algorithm, blocks[kept].contiguous(), channels, starts, both, inputs, outputs)
