"""Structured sparsification: convolutions become grouped ones, with a learned channel shuffle between them.

During training, every layer's channels are put in the order that brings its large kernels together in diagonal blocks,
and what lies outside the blocks is pushed towards zero. In the end it is cut off, and each layer is a grouped
convolution whose channels are shuffled as learned. Fine-tuning is a `train` step behind this one.

Source: Zhang et al., Model-Agnostic Structured Sparsification with Learnable Channel Shuffle, arXiv 2002.08127.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tersenet.methods.base import Context, TrainingMethod

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph
    from tersenet.group_learning.hooks import GroupLearning


class StructuredSparsification(TrainingMethod):
    """Learn which channels belong together, push the other connections to zero, and make grouped convolutions.

    Differs: any network with plain Conv2d layers; the weights are masked once, in the end, and never in forward; what
    is saved is the grouped network, its gathers fused; parameters count as they are, not by the layers' names; the
    finest grouping can be reached; odd and dead layers stay as they are; biases are put in order too.
    """

    method: ClassVar[str] = "structured_sparsification"

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share of the groupable convolutions' weights removed (the paper's). A target goes before it."""
    latency: float | None = Field(default=None, gt=0, le=1)
    """Share of the groupable convolutions' time that is left, as measured on this machine. It goes before a target."""
    latency_batch: int = Field(default=1, ge=1)
    """Images at a time that it is measured with."""
    include: tuple[str, ...] = ("*",)
    """Convolutions to group, by name pattern, `position:first` or `position:last`."""
    exclude: tuple[str, ...] | None = None
    """Convolutions to leave as they are. Default: those that read the network's input."""
    threshold: float = Field(default=0.1, gt=0, lt=1)
    """Share of a layer's norm that may lie outside its groups while it trains."""
    decay: float = Field(default=0.5, gt=0, le=1)
    """How much less a connection costs at each finer split."""
    any_divisor: bool = False
    """Split by odd factors too, not only by two: for channels that were pruned before."""
    min_group_width: int = Field(default=2, ge=1)
    """Channels that every group has at least, on both sides. Of powers of two, 2 gives the paper's finest grouping."""
    max_groups: int | None = Field(default=None, ge=1)
    """The largest number of groups."""
    strength: float = Field(default=2e-6, ge=0)
    """The regulariser's first coefficient, and the step by which it changes."""
    gain: float | None = Field(default=None, gt=0)
    """Steps per average pace that an epoch falls short of; by default at most one step per epoch (the paper)."""
    warmup: int = Field(default=5, ge=0)
    """First epochs without the regulariser."""
    first_rounds: int = Field(default=50, ge=1)
    """Alternations of the assignment before training, at most."""
    rounds: int = Field(default=20, ge=1)
    """The same after every epoch."""
    every_steps: int | None = Field(default=None, ge=1)
    """Learn the order inside an epoch too, after every so many steps: 500 for ImageNet."""
    step_rounds: int = Field(default=5, ge=1)
    """Alternations then."""
    restarts: int = Field(default=0, ge=0)
    """Random orders to start from beside the known one, before training."""
    trim: bool = False
    """Give back groups, layer by layer, while the goal stays met; by default what one threshold saves above it stays
    saved (the paper)."""
    trunks: Literal["own", "shared"] = "own"
    """`own`: every layer orders its channels for itself (the paper). `shared`: the layers that write to a residual
    trunk and those that read it have one order together, which leaves no gather on it, and less freedom."""
    fuse: bool = True
    """Put the channels between layers in the order that one of them wants, which leaves fewer gathers."""

    @model_validator(mode="after")
    def _pushes_at_all(self) -> StructuredSparsification:
        if self.warmup >= self.fit.epochs:
            raise ValueError(f"warmup (={self.warmup}) must be below the number of epochs (={self.fit.epochs})")
        return self

    @model_validator(mode="after")
    def _one_goal(self) -> StructuredSparsification:
        if self.sparsity is not None and self.latency is not None:
            raise ValueError("sparsity and latency are two goals: give one of them")
        return self

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Rehearse the grouping on a copy, in any order: hours of training must not end with a refusal."""
        self._rehearse(graph.copy(), context, rounds=1)

    def preview(self, graph: ModelGraph, context: Context) -> None:
        context.notes += self._rehearse(graph, context, self.rounds)

    def _rehearse(self, graph: ModelGraph, context: Context, rounds: int) -> list[str]:
        from tersenet.graph.grouping import group_convolutions, mask_groups

        hooks = self.hooks(graph, context)
        groupings = hooks.decide(rounds)
        mask_groups(hooks.graph, groupings)
        group_convolutions(hooks.graph, groupings, self.fuse)
        return hooks.describe(groupings)

    def hooks(self, graph: ModelGraph, context: Context) -> GroupLearning:
        from tersenet.group_learning.hooks import GroupLearning

        return GroupLearning(self, graph.with_residual("coupled"), context)

    def finish(self, graph: ModelGraph, context: Context, hooks: Any) -> None:
        """Cut what lies outside the groups, measure with the zeros in, then make grouped convolutions."""
        from tersenet.graph.grouping import group_convolutions, mask_groups

        groupings = hooks.decide()
        context.maps += hooks.maps_of(groupings)
        unmasked = context.evaluate()
        mask_groups(hooks.graph, groupings)
        context.masked = context.evaluate()
        context.equality = group_convolutions(hooks.graph, groupings, self.fuse)
        if unmasked is not None and unmasked.top1 is not None:
            context.notes.append(f"top-1 was {unmasked.top1:.2%} before the weights outside the groups were cut off")
        context.notes += hooks.describe(groupings)
