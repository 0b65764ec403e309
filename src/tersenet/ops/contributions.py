"""What each input channel of a layer contributes to its outputs, as a Gram matrix over channels.

Channel i contributes Z_i = X_i W_i^T. Selection needs only the products of the Z_i with each other and with the wanted
outputs, and these follow from the layer's second moments: no sample is seen twice.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1 (the formulation).
Differs: Gram form instead of expanded rows; everything centred per output, where the published code has one intercept
for all outputs; several layers that read the same channels can be summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.ops.gram import Moments, StatisticsError

_TILE = 128  # columns of the moments handled at once: what is made of them stays in the cache


@dataclass(frozen=True)
class Contributions:
    """`gram` (C, C) of the channels' contributions, `target` (C,) of contributions and wanted outputs, both float64.

    `energy` is the wanted outputs' own sum of squares; everything is centred per output. `precision` is the machine
    epsilon of what they were made of.
    """

    gram: Tensor
    target: Tensor
    energy: float
    precision: float

    def of_units(self, units: Tensor, count: int) -> Contributions:
        """Contributions of `count` units, where channel i belongs to unit `units[i]`, or to none if that is negative.

        Channels of one unit go together. Channels of none always stay: the units only have to make up for the rest.
        """
        here = self.gram.device
        owner = torch.zeros(len(units), count, dtype=torch.float64, device=here)
        owned = torch.nonzero(units >= 0)[:, 0].to(here)
        owner[owned, units.to(here)[owned]] = 1
        always = (units < 0).to(owner)
        fixed = self.gram @ always
        energy = self.energy - float(always @ (2 * self.target - fixed))
        return Contributions(
            owner.T @ self.gram @ owner, owner.T @ (self.target - fixed), max(energy, 0.0), self.precision
        )


def contributions(moments: Moments, weight: Tensor) -> Contributions:
    """What each input channel contributes through `weight` (O, C, *kernel) to outputs like those of `moments`.

    gram_ij is a block sum of the Hadamard product of xx and W^T W; neither rows nor outputs are expanded.

    Raises:
        StatisticsError: the weight holds a NaN or an infinity.
        ValueError: the weight does not fit the moments.
    """
    channels = weight.shape[1]
    flat = weight.detach().flatten(1).to(moments.xy)
    if flat.shape != (moments.outputs, moments.inputs):
        raise ValueError(
            f"the weight {tuple(weight.shape)} of {moments.name!r} does not fit moments of "
            f"{moments.inputs} inputs and {moments.outputs} outputs"
        )
    if not bool(torch.isfinite(flat.sum())):
        raise StatisticsError(f"the weight of {moments.name!r} holds values that are NaN or infinite.")
    taps = moments.inputs // channels
    gram = torch.zeros(channels, channels, dtype=flat.dtype, device=flat.device)
    # A channel's products need not be more exact than those of the rows. Float32 has no room for very large ones.
    is_short = moments.precision >= torch.finfo(torch.float32).eps and float(moments.lower.diagonal().max()) < 1e30
    short = flat.float() if is_short else flat
    per_tile = max(1, _TILE // taps)
    for start in range(0, channels, per_tile):
        end = min(start + per_tile, channels)
        rows, columns = slice(start * taps, end * taps), slice(0, end * taps)
        products = short[:, rows].T @ short[:, columns]
        products *= moments.lower[rows, columns].to(short)
        products[:, rows].tril_()
        gram[start:end, :end] = products.view(end - start, taps, -1).sum(1).view(end - start, end, taps).sum(2)
    # A channel with itself: what is above the diagonal is what is below it.
    own = (moments.lower.diagonal() * flat.square().sum(0)).view(channels, taps).sum(1)
    gram = gram + gram.tril(-1).T + torch.diag(gram.diagonal() - own)
    target = (moments.xy * flat.T).view(channels, -1).sum(1)
    return Contributions(gram, target, moments.energy, moments.precision)


def summed(parts: Sequence[Contributions]) -> Contributions:
    """Contributions of the same channels to several layers, each in units of that layer's own energy."""
    scales = [1 / part.energy if part.energy > 0 else 0.0 for part in parts]
    weighted = list(zip(parts, scales, strict=True))
    gram = torch.stack([part.gram * scale for part, scale in weighted]).sum(0)
    target = torch.stack([part.target * scale for part, scale in weighted]).sum(0)
    energy = sum(part.energy * scale for part, scale in weighted)
    return Contributions(gram, target, energy, max(part.precision for part in parts))
