"""Which weights of a layer stay: scores, blocks, counts and masks. Weights are (taps, C_in, C_out), one matrix per tap.

Source: Liu et al., ICLR 2018 (the largest int(size * density) of each layer, masks nested); importance from Yu et al.,
Spatial-Winograd pruning, arXiv 1901.02132.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.ops.importance import lamp

Pattern = Literal["unstructured", "16x1", "4x1", "2:4"]
Scope = Literal["layer", "global", "lamp"]
BLOCKS: dict[str, int] = {"unstructured": 1, "16x1": 16, "4x1": 4}
"""Pattern -> output channels that stay or go together, for one input channel and tap."""


def tap_importance(at: Tensor, bt: Tensor) -> Tensor:
    """A^T (m, t), B^T (t, t) -> (t t,): |b_i| |a_i| |b_j| |a_j|, how much of a weight's error reaches the output.

    b_i is a row of B^T, a_i a column of A^T. Source: Yu et al., Spatial-Winograd pruning, arXiv 1901.02132.
    """
    one = torch.linalg.vector_norm(bt, dim=1) * torch.linalg.vector_norm(at, dim=0)
    return torch.outer(one, one).flatten()


def kept_count(size: int, density: float) -> int:
    """int(size * density), but at least 1: the published slice `[:-0]` kept everything then.

    Differs: the small addend keeps 100 * 0.29 from becoming 28.
    Raises: TersenetError for a density that is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise TersenetError(f"density (={density:g}), the share of weights that is kept, must be above 0 and at most 1")
    return max(1, math.floor(size * density + 1e-9))


def block_scores(scores: Tensor, block: int) -> Tensor:
    """(taps, C_in, C_out) -> (taps, C_in, blocks): means of blocks of output channels; the last may be smaller."""
    if block == 1:
        return scores
    whole, rest = scores.shape[2] // block * block, scores.shape[2] % block
    found = scores[..., :whole].unflatten(2, (-1, block)).mean(3) if whole else scores[..., :0]
    return torch.cat((found, scores[..., whole:].mean(2, keepdim=True)), 2) if rest else found


def from_blocks(mask: Tensor, block: int, channels: int) -> Tensor:
    """(taps, C_in, blocks) -> (taps, C_in, channels)"""
    return mask.repeat_interleave(block, 2)[..., :channels]


def to_blocks(mask: Tensor, block: int) -> Tensor | None:
    """The inverse of `from_blocks`; None if the mask is not one of such blocks."""
    found = mask[..., ::block]
    return found if torch.equal(from_blocks(found, block, mask.shape[2]), mask) else None


def two_of_four(scores: Tensor) -> Tensor:
    """The two largest of every four input channels, per tap and output channel; of a rest below four also two."""
    taps, inputs, outputs = scores.shape
    padded = torch.nn.functional.pad(scores, (0, 0, 0, -inputs % 4), value=-math.inf).unflatten(1, (-1, 4))
    kept = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, padded.topk(2, 2).indices, True)
    return kept.flatten(1, 2)[:, :inputs].reshape(taps, inputs, outputs)


def masks(
    scores: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    densities: Mapping[str, float],
    pattern: Pattern,
    scope: Scope,
) -> dict[str, Tensor]:
    """Layer -> mask (taps, C_in, C_out), each inside the one before.

    With `layer` every layer keeps its own density of its blocks; with `global` and `lamp` all layers together keep as
    many, those with the highest scores, with `lamp` as shares of their layer; each layer keeps a block at least.

    Where less is left than a density asks for, all of that is kept.

    Raises: TersenetError for a density out of range.
    """
    if pattern == "2:4":
        found = {name: two_of_four(score.masked_fill(~before[name], -1)) for name, score in scores.items()}
        return {name: mask & before[name] for name, mask in found.items()}
    block = BLOCKS[pattern]
    blocks = {name: _alive_blocks(score, before[name], block) for name, score in scores.items()}
    counts = {name: kept_count(score.numel(), densities[name]) for name, score in blocks.items()}
    if scope == "layer":
        kept = {name: _largest(score.flatten(), counts[name]) for name, score in blocks.items()}
    else:
        kept = _across(blocks, sum(counts.values()), scope)
    return {
        name: from_blocks(kept[name].view(score.shape), block, before[name].shape[2]) & before[name]
        for name, score in blocks.items()
    }


def _alive_blocks(scores: Tensor, mask: Tensor, block: int) -> Tensor:
    """Scores of blocks, -1 where all of one is pruned already."""
    found = block_scores(scores.masked_fill(~mask, 0), block)
    return found.masked_fill(block_scores(mask.to(scores.dtype), block) == 0, -1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """(n,) bool, no more than are left. Of equal scores the first are kept, so that every process keeps the same."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[: min(count, int((scores >= 0).sum()))]] = True
    return kept


def _across(blocks: Mapping[str, Tensor], total: int, scope: Scope) -> dict[str, Tensor]:
    flat = {name: score.flatten() for name, score in blocks.items()}
    ranked: list[Tensor] = []
    for score in flat.values():
        alive = score.clamp(min=0)
        shares = (lamp(alive) if scope == "lamp" else alive).masked_fill(score < 0, -1)
        # Its best block stays with every layer.
        shares[shares.argmax()] = math.inf
        ranked.append(shares)
    kept = _largest(torch.cat(ranked), max(total, len(ranked)))
    return dict(zip(flat, kept.split([len(score) for score in ranked]), strict=True))
