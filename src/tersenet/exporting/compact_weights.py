"""Masked weights as they are saved: the values that are kept, and one bit for each place, or for each block of places.

Above a density of 1/16 a bit per place takes less than the smallest indices of two bytes would, and blocks divide it
by their size: at density 0.25 unstructured weights take 0.28 of the dense ones, in 16x1 blocks 0.252.
"""

from __future__ import annotations

from math import ceil, prod

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.errors import ArtifactError
from tersenet.nn.masked import MaskedWeight, masked_layers
from tersenet.ops.weight_masks import BLOCKS, from_blocks, to_blocks

_BLOCKS = sorted(BLOCKS.values(), reverse=True)


def packed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of the state dict with `NAME.kept` values and `NAME.places16` bits in place of weights and masks."""
    found = dict(tensors)
    for name, layer in masked_layers(model).items():
        mask = layer.canonical(found.pop(f"{name}.mask"))
        block, kept = next((b, kept) for b in _BLOCKS if (kept := to_blocks(mask, b)) is not None)
        found[f"{name}.kept"] = layer.canonical(found.pop(f"{name}.weight"))[mask]
        found[f"{name}.places{block}"] = torch.from_numpy(np.packbits(kept.flatten().numpy()))
    return found


def unpacked(model: nn.Module, tensors: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """The inverse of `packed`, for a network of the same structure, which may be without data.

    Raises: ArtifactError for bits or values that don't fit the network's layers.
    """
    found = dict(tensors)
    for name, layer in masked_layers(model).items():
        values = found.pop(f"{name}.kept", None)
        block = next((block for block in _BLOCKS if f"{name}.places{block}" in found), None)
        # What is missing is said with all that is missing.
        if values is not None and block is not None:
            places = found.pop(f"{name}.places{block}")
            mask = _mask(name, layer, places, block, file)
            if values.dim() != 1 or not values.is_floating_point() or len(values) != int(mask.sum()):
                raise ArtifactError(
                    f"{file}: {name}.kept has {values.numel()} values of {values.dtype} for {int(mask.sum())} places"
                )
            weight = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
            found[f"{name}.weight"] = layer.stored(weight).contiguous()
            found[f"{name}.mask"] = layer.stored(mask).contiguous()
    return found


def _mask(name: str, layer: MaskedWeight, places: Tensor, block: int, file: str) -> Tensor:
    """(taps, C_in, C_out). What it takes is known from the network before anything is allocated."""
    taps, inputs, outputs = layer.canonical(layer.weight).shape
    shape = (taps, inputs, ceil(outputs / block))
    if places.dtype != torch.uint8 or places.shape != (ceil(prod(shape) / 8),):
        raise ArtifactError(
            f"{file}: {name}.places{block} is {places.dtype} {tuple(places.shape)} for {prod(shape):,} places of "
            f"{tuple(shape)}"
        )
    bits = np.unpackbits(places.numpy(), count=prod(shape)).astype(bool)
    return from_blocks(torch.from_numpy(bits).view(shape), block, outputs)
