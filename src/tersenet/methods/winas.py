"""wiNAS: for each convolution, the best of direct, F2, F4 and F6 in floating point, 16 or 8 bits, by measured latency.

`winas` finds them as the paper does, by a differentiable search; `winograd_knapsack` from the sensitivity of single
layers, without training.

Source: Fernandez-Marques et al., Searching for Winograd-aware Quantized Networks, MLSys 2020, arXiv 2002.10711; the
search of two sampled paths, from Cai et al., ProxylessNAS, ICLR 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, Method, TrainingMethod
from tersenet.nn.winograd_settings import Bits, Flex, Quantization, Quantizer, WinogradSettings
from tersenet.train.hooks import Hooks

if TYPE_CHECKING:
    from tersenet.graph.convolutions import Convolution
    from tersenet.graph.model import ModelGraph
    from tersenet.winograd_search.layers import Layers

Tile = Annotated[int, Field(ge=2, le=8)] | Literal["direct"]


class _Choosing(Method):
    """What both searches share: the candidates, and what they cost."""

    tiles: tuple[Tile, ...] = ("direct", 2, 4, 6)
    """Candidates: `direct`, or m of F(m x m, r x r). A layer has those that fit on its map; one that can't be a
    Winograd layer has `direct` only."""
    bits: tuple[Bits | None, ...] = (None,)
    """Candidates: null computes in floating point. The paper's WA search has null only, its WA-Q search null, 16, 8."""
    flex: Flex = "static"
    """Whether the chosen layers' transforms are trained, see `winograd_aware`."""
    latency: str | None = None
    """A latency table, which `tersenet winograd latency` writes. Default: measured on this machine now, and kept."""
    batch: int = Field(default=1, ge=1)
    """Images at a time that latency is measured with, where there is no table."""
    include: tuple[str, ...] = ("*",)
    """Layers to choose for, by name pattern, `position:first`, `position:last`, `type:conv` or `type:grouped`."""
    exclude: tuple[str, ...] = ("position:first",)
    """Layers that stay as they are."""
    calibration_batches: int = Field(default=4, ge=1)
    """Training batches that ranges, and sensitivities, are taken from."""

    def layers(self, graph: ModelGraph, context: Context) -> Layers:
        """Every layer with its candidates. Raises: TersenetError if no layer has two, or there are no images."""
        from tersenet.graph.convolutions import convolutions, tags
        from tersenet.graph.select import check_patterns, matches_any
        from tersenet.winograd_search.layers import Layers

        found, left = convolutions(graph, grouped=True)
        known = tags({conv.name: conv.module for conv in found})
        check_patterns([*self.include, *self.exclude], [*known, *left])
        own = [c for c in found if matches_any(known[c.name], self.include)]
        own = [c for c in own if not matches_any(known[c.name], self.exclude)]
        candidates = [(conv, self._candidates(conv)) for conv in own]
        candidates = [(conv, ways) for conv, ways in candidates if len(ways) > 1]
        if not candidates:
            raise TersenetError(f"no layer is left for {self.method}: none has more than one candidate")
        if context.data is None or context.data.train is None or len(context.data.train) == 0:
            raise TersenetError(f"{self.method} measures on training images: give some, such as --data digits")
        plain = "direct" in self.tiles and None in self.bits
        return Layers(candidates, plain, self.latency, self.batch)

    def _candidates(self, conv: Convolution) -> tuple[WinogradSettings | Quantization | None, ...]:
        """Settings of each way of computing `conv`. The first is None, the convolution as it is: what the others are
        compared with, whether or not it may be chosen."""
        found: list[WinogradSettings | Quantization | None] = [None]
        fits = conv.hindrance(strided=False) is None
        for bits in dict.fromkeys(self.bits):
            for tile in dict.fromkeys(self.tiles):
                if tile == "direct" and bits is not None:
                    one = Quantizer(bits=bits)
                    found.append(Quantization(input=one, weight=one, output=one))
                elif tile != "direct" and fits and tile <= min(conv.sides):
                    quantization = None if bits is None else Quantization.tapwise(bits)
                    found.append(WinogradSettings(tile=tile, flex=self.flex, quantization=quantization))
        return tuple(found)


class WinogradKnapsack(_Choosing):
    """Choose each layer's computation from how much it alone costs in loss, under a budget of latency.

    The sum of the layers' losses is what is kept small: each is measured with all others as they are. There is no
    training; `train` after it adapts the network.
    """

    method: ClassVar[str] = "winograd_knapsack"

    share: float = Field(default=0.6, gt=0, le=1)
    """Latency that the chosen layers may have together, as a share of what they cost as they are."""

    def apply(self, graph: ModelGraph, context: Context) -> None:
        layers = self.layers(graph, context)
        budget = layers.check_budget(self.share)
        layers.sensitivities(graph, context, self.calibration_batches)
        chosen = layers.knapsack(budget)
        layers.put(graph, context, chosen, self.calibration_batches)
        context.notes += layers.notes(chosen)

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """Nothing: no image is read, so nothing can be chosen."""
        context.notes.append("what each layer becomes is found by measuring on training images: not in a dry run")


class Winas(_Choosing, TrainingMethod):
    """Choose each layer's computation by a differentiable search, as the paper does.

    Each layer has a logit a for each candidate. In a training step every layer runs one candidate, drawn by softmax(a),
    and weights are trained. After every `every` steps the logits are, on other images: with two candidates drawn for
    each layer, loss = task loss + l2 * |a|^2 + latency_weight * expected latency. In the end the largest logit counts.

    Differs: candidates share their layer's weights; latency is a share of what the network costs as it is, so that
    `latency_weight` means the same on any machine; transforms are static while it is searched.
    """

    method: ClassVar[str] = "winas"

    latency_weight: float = Field(default=0.1, ge=0)
    """The paper's lambda 2, of the expected latency; it uses 0.1 to 0.001."""
    l2: float = Field(default=1e-4, ge=0)
    """The paper's lambda 1, of the squared logits."""
    logits_lr: float = Field(default=0.01, gt=0)
    """Learning rate of the logits, by Adam without momentum (beta 1 = 0)."""
    every: int = Field(default=1, ge=1)
    """Training steps for each step of the logits."""

    def apply(self, graph: ModelGraph, context: Context) -> None:
        self.layers(graph, context).check_budget(1.0)

    def preview(self, graph: ModelGraph, context: Context) -> None:
        """Nothing is chosen yet."""
        context.notes.append("what each layer becomes is found in training: not in a dry run")

    def hooks(self, graph: ModelGraph, context: Context) -> Hooks:
        from tersenet.winograd_search.search import WinasSearch

        return WinasSearch(self, self.layers(graph, context), graph, context)

    def finish(self, graph: ModelGraph, context: Context, hooks: Any) -> None:
        """The candidates of the largest logits become edits, and their ranges are taken anew."""
        chosen = hooks.close()
        hooks.layers.put(graph, context, chosen, self.calibration_batches)
        context.notes += hooks.layers.notes(chosen, hooks.probabilities())
