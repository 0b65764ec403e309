"""Sparse Winograd convolution: weights, and ReLUs, move into the Winograd domain, and the weights are pruned there.

Source: Liu et al., Efficient Sparse-Winograd Convolutional Neural Networks, ICLR 2018. The importance of taps: Yu et
al., Spatial-Winograd pruning, arXiv 1901.02132; the gradual schedule: Zhu and Gupta, arXiv 1710.01878.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tersenet.errors import TersenetError
from tersenet.methods.base import Context, TrainingMethod
from tersenet.nn.winograd_relu_settings import Init, WinogradReLUSettings
from tersenet.nn.winograd_settings import Points
from tersenet.ops.rate_schedule import rate_at
from tersenet.train.hooks import Hooks, TrainState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tersenet.graph.model import ModelGraph
    from tersenet.graph.sparse_plan import SparsePlan
    from tersenet.nn.masked import MaskedWeight

Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
_WHAT = {
    "winograd_relu": "with weight and ReLU in the Winograd domain",
    "native": "with their weight in the Winograd domain",
    "spatial": "as they are, with a mask",
}


class SparseWinograd(TrainingMethod):
    """Put 3x3 convolutions into the Winograd domain, with the ReLU before them, train, and prune their weights there.

    A network that was converted by an earlier step is pruned on: masks are nested, what is pruned stays.

    Differs: any network and map; a trained network can be the start, with the ReLU moving gradually; layers may keep
    densities of their own; blocks; linear layers, if asked for; a density that would keep less than one weight keeps
    one, not all.
    """

    method: ClassVar[str] = "sparse_winograd"

    mode: Literal["winograd_relu", "native", "spatial"] = "winograd_relu"
    """`winograd_relu`: weights and ReLUs in the Winograd domain (the paper). Its baselines: `native`, the ReLU stays
    where it was; `spatial`, ordinary convolutions with a mask."""
    others: Literal["leave", "native"] = "leave"
    """What becomes of a layer whose ReLU can't move, because others read it too: nothing, or it is `native`."""
    tile: int = Field(default=2, ge=2, le=4)
    """m of F(m x m, 3 x 3): 2 as published, or 3 or 4."""
    points: Points = "reference"
    """The transforms' points. `reference`: the published ones."""
    init: Init = "transform"
    """Weights of layers that are converted: `transform`, G g G^T of what they were; `reference`, drawn as published;
    `unit`, drawn so that the variance stays."""
    move: Share = 0.0
    """Share of the training in which the ReLU moves, as a mixture of both; 0: at once, as published."""
    density: Density | None = None
    """Share of the weights that is kept. None: converted layers are trained dense."""
    densities: dict[str, Density] = Field(default_factory=dict)
    """Densities of single layers, by name pattern; the first pattern that matches counts."""
    scope: Literal["layer", "global", "lamp"] = "layer"
    """Every layer keeps the density (the paper), or all together, by one threshold; `lamp`: on shares of each layer."""
    score: Literal["magnitude", "importance"] = "magnitude"
    """`importance`: magnitude times what the transforms make of each tap's error; much better for tile 4."""
    pattern: Literal["unstructured", "16x1", "4x1", "2:4"] = "unstructured"
    """What stays or goes: single weights; blocks of 16 or 4 output channels by one input channel, in each tap; two of
    every four input channels."""
    schedule: Literal["once", "iterative", "cubic"] = "once"
    """`once`: before training. `iterative`: through `stages`, the epochs shared among them. `cubic`: after each epoch
    between `prune_from` and `prune_to`."""
    stages: tuple[Density, ...] = ()
    """For `iterative`: falling densities; `density` is the last of them."""
    prune_from: Share = 0.0
    """Share of the training after which `cubic` begins."""
    prune_to: Share = 0.75
    """Share of the training after which `cubic` has reached the density."""
    linear: Literal["dense", "hidden", "all"] = "dense"
    """Linear layers: `dense`, as they are (the paper); pruned too, `hidden`, but the one that runs last, or `all`."""
    spatial_gradient: bool = False
    """Multiply the gradient by G G^T on both sides: steps are then those of training the filters themselves."""
    threshold: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of `native` layers: what is no further than this from zero behind the input transform becomes zero, so that
    activations have zeros there as with `winograd_relu`. Behind batch norm and a ReLU 0.25 leaves half of them."""
    include: tuple[str, ...] = ("*",)
    """Layers, by name pattern, `position:first` or `position:last` of the convolutions; linear ones by name."""
    exclude: tuple[str, ...] = ("position:first",)
    """Layers to leave as they are."""

    @model_validator(mode="after")
    def _fits_together(self) -> SparseWinograd:
        alone = self.density in (None, 0.5) and not self.densities and self.schedule == "once" and self.scope == "layer"
        if self.pattern == "2:4" and not alone:
            raise ValueError("pattern 2:4 has density 0.5 in every layer, at once: drop the other settings")
        if self.scope != "layer" and self.densities:
            raise ValueError("densities of single layers need `scope: layer`")
        if self.score == "importance" and self.mode == "spatial":
            raise ValueError("`score: importance` weighs the taps of the Winograd domain; spatial pruning has none")
        if self.mode != "winograd_relu" and self.move:
            raise ValueError(f"nothing moves with `mode: {self.mode}`: drop `move`")
        if self.threshold and self.mode != "native" and self.others != "native":
            raise ValueError(f"`threshold` is for native layers, and there are none with `mode: {self.mode}`")
        if self.mode == "spatial" and (self.init != "transform" or self.spatial_gradient):
            raise ValueError("`init` and `spatial_gradient` are for weights in the Winograd domain")
        if self.linear != "dense" and self.goal is None and not self.densities:
            raise ValueError(f"`linear: {self.linear}` needs a density: linear layers are pruned, and nothing else")
        if (self.schedule == "iterative") != bool(self.stages):
            raise ValueError("`schedule: iterative` needs stages, and stages need it")
        if self.stages:
            if any(a <= b for a, b in zip(self.stages, self.stages[1:], strict=False)):
                raise ValueError(f"stages {self.stages} must fall")
            if self.densities or self.density not in (None, self.stages[-1]):
                raise ValueError("with stages the last of them is the density of every layer")
            if len(self.stages) > self.fit.epochs:
                raise ValueError(f"{len(self.stages)} stages need as many epochs, not {self.fit.epochs}")
        if self.schedule == "cubic" and not self.prune_from < self.prune_to:
            raise ValueError(f"prune_from (={self.prune_from}) must be below prune_to (={self.prune_to})")
        if self.schedule != "once" and self.goal is None:
            raise ValueError(f"`schedule: {self.schedule}` needs a density")
        return self

    @property
    def goal(self) -> float | None:
        """The density in the end, of layers without one of their own."""
        if self.pattern == "2:4":
            return 0.5
        return self.stages[-1] if self.stages else self.density

    @property
    def layer_settings(self) -> WinogradReLUSettings:
        relu = self.mode == "winograd_relu"
        return WinogradReLUSettings(tile=self.tile, points=self.points, relu=relu, threshold=self.threshold)

    def apply(self, graph: ModelGraph, context: Context) -> None:
        """Restores the network if anything fails."""
        from tersenet.graph.sparse_plan import sparse_plan
        from tersenet.graph.undo import graph_state_of

        plan = sparse_plan(graph, self.mode, self.others, self.layer_settings, self.include, self.exclude, self.linear)
        densities = self.densities_of(plan.layers)
        if not plan.edits and not densities:
            raise TersenetError(
                f"no layer is left to convert, and no density is given for {', '.join(plan.before)}, converted before: "
                f"sparse_winograd has nothing to do ({plan.reasons() or 'no other convolution'})"
            )
        self._check_left(graph, densities)
        undo = graph_state_of(graph)
        try:
            self._carry_out(graph, plan, densities)
        except BaseException:
            undo()
            raise
        plan.linear = [name for name in plan.linear if name in densities]
        context.notes += plan.notes(_WHAT[self.mode])

    def preview(self, graph: ModelGraph, context: Context) -> None:
        self.apply(graph, context)
        self.hooks(graph, context).prune([graph.model], 1.0)

    def hooks(self, graph: ModelGraph, context: Context) -> SparseTraining:
        from tersenet.graph.sparse_plan import layers_of, selected

        own = layers_of(graph, self.mode, self.others, self.linear)
        named = [name for name in selected(graph, self.include, self.exclude, self.linear) if name in own]
        train = context.data.train if context.data is not None else None
        return SparseTraining(self, graph.model, named, len(train) if train is not None else 1)

    def finish(self, graph: ModelGraph, context: Context, hooks: Hooks) -> None:
        """What is pruned is zero, and the ReLUs have moved."""
        from tersenet.nn.masked import masked_layers

        if isinstance(hooks, SparseTraining):
            hooks.set_share([graph.model], 0.0)
        masked = masked_layers(graph.model)
        for layer in masked.values():
            layer.clean()
        if masked:
            kept = sum(int(layer.mask.sum()) for layer in masked.values() if layer.mask is not None)
            size = sum(layer.weight.numel() for layer in masked.values())
            each = ", ".join(f"{name} {layer.density:.4g}" for name, layer in masked.items())
            context.notes.append(f"{kept:,} of {size:,} weights are kept, density {kept / size:.4g}: {each}")

    def _carry_out(self, graph: ModelGraph, plan: SparsePlan, densities: Iterable[str]) -> None:
        from tersenet.graph.edits import Sparsify
        from tersenet.nn.masked import masked_layers
        from tersenet.nn.winograd_relu import WinogradReLUConv2d

        for edit in plan.edits:
            graph.apply(edit)
        masked = masked_layers(graph.model)
        for name in densities:
            if name not in masked:
                graph.apply(Sparsify(module=name))
        # Last: a bias is still the convolution's own, and what is written into it would stay.
        for edit in plan.edits:
            layer = graph.model.get_submodule(edit.module)
            if isinstance(layer, WinogradReLUConv2d):
                layer.reset(self.init)

    def densities_of(self, layers: list[str]) -> dict[str, float]:
        """Layer -> its density in the end; those that stay dense are left out.

        Raises: UnknownNameError for a pattern in `densities` that matches none of them.
        """
        from tersenet.graph.select import check_patterns, matches

        check_patterns(self.densities, layers)
        found: dict[str, float] = {}
        for name in layers:
            own = next((d for pattern, d in self.densities.items() if matches(name, [pattern])), self.goal)
            if own is not None:
                found[name] = own
        return found

    def _check_left(self, graph: ModelGraph, densities: dict[str, float]) -> None:
        """Raises: TersenetError if layers that were pruned before are to have more weights than they have left."""
        from tersenet.nn.masked import masked_layers

        masked = {name: layer for name, layer in masked_layers(graph.model).items() if name in densities}
        first = {name: self.stages[0] if self.stages else density for name, density in densities.items()}
        if self.schedule == "cubic" or self.pattern == "2:4":
            first = dict(densities)
        left = {name: layer.density for name, layer in masked.items()}
        if self.scope != "layer" and left:
            sizes = {name: layer.weight.numel() for name, layer in masked.items()}
            left = {"all layers together": sum(left[n] * sizes[n] for n in left) / sum(sizes.values())}
            first = dict.fromkeys(left, next(iter(first.values())))
        for name, density in left.items():
            # Whole blocks seldom make a density exactly.
            if first[name] > density + 0.01:
                raise TersenetError(
                    f"{name}: a density of {first[name]:g} is asked for, and {density:.4g} is left; pruned weights "
                    "don't come back, so choose a density below that"
                )


class SparseTraining(Hooks):
    """Masks that get sparser, and ReLUs that move. The network's own state has the masks, so every checkpoint does."""

    def __init__(self, settings: SparseWinograd, model: nn.Module, layers: list[str], steps_per_epoch: int) -> None:
        self.settings = settings
        self.model = model
        self.densities = settings.densities_of(layers)
        self.layers = layers
        self.steps_per_epoch = steps_per_epoch
        self.share = 0.0

    def before_training(self, state: TrainState) -> None:
        self.set_share(_networks(state), self.share_at(0))
        self._prune(state, 0)

    def before_step(self, state: TrainState) -> None:
        if self.settings.spatial_gradient:
            for name in self.layers:
                _as_spatial(state.model.get_submodule(name))

    def after_step(self, state: TrainState) -> None:
        for layer in self._masked(state.model).values():
            layer.clean()
        if self.share > 0:
            self.set_share([state.model], self.share_at(state.step))

    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        self.set_share(_networks(state), self.share)
        self._prune(state, state.epoch + 1)
        row: dict[str, Any] = {"spatial_share": self.share} if self.settings.move else {}
        masks = [layer.mask for layer in self._masked(state.model).values() if layer.mask is not None]
        if masks:
            row["density"] = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        return row

    def selectable(self, epoch: int) -> bool:
        """Only networks that are as sparse as they shall be, with their ReLUs where they belong."""
        done = epoch + 1
        return self.progress(done) == 1 and self.share_at(done * self.steps_per_epoch) == 0

    def progress(self, done: int) -> float:
        """How much of the pruning is done after so many epochs, 0 to 1."""
        s, total = self.settings, self.settings.fit.epochs
        if s.goal is None and not self.densities:
            return 1.0
        if s.schedule == "once" or done >= total:
            return 1.0
        if s.schedule == "iterative":
            return (done * len(s.stages) // total + 1) / len(s.stages)
        return min(1.0, max(0.0, (done / total - s.prune_from) / (s.prune_to - s.prune_from)))

    def share_at(self, step: int) -> float:
        """Of the spatial ReLU, before a step."""
        steps = self.settings.move * self.settings.fit.epochs * self.steps_per_epoch
        return max(0.0, 1 - step / steps) if steps else 0.0

    def density_at(self, goal: float, progress: float) -> float:
        stages = self.settings.stages
        if stages:
            return stages[round(progress * len(stages)) - 1]
        return goal if progress == 1 else 1 - rate_at("cubic", 1 - goal, 0.0, 0.0, progress, 1.0)

    def _prune(self, state: TrainState, done: int) -> None:
        progress = self.progress(done)
        if not self.densities or progress == 0 or (done > 0 and self.progress(done - 1) == progress):
            return
        self.prune(_networks(state), progress)
        # Else momentum would go on moving what is pruned.
        for layer in self._masked(state.model).values():
            for value in state.optimizer.state.get(layer.weight, {}).values():
                if getattr(value, "shape", None) == layer.weight.shape and layer.mask is not None:
                    value.masked_fill_(~layer.mask, 0)

    def prune(self, networks: list[nn.Module], progress: float) -> None:
        """Give the first network its masks, and the others the same."""
        from tersenet.ops.weight_masks import masks

        layers = self._masked(networks[0])
        if not layers:
            return
        scores = {name: self._scores(layer) for name, layer in layers.items()}
        before = {name: layer.canonical(layer.mask) for name, layer in layers.items() if layer.mask is not None}
        densities = {name: self.density_at(self.densities[name], progress) for name in layers}
        found = masks(scores, before, densities, self.settings.pattern, self.settings.scope)
        for network in networks:
            for name, layer in self._masked(network).items():
                layer.set_mask(found[name])

    def set_share(self, networks: list[nn.Module], share: float) -> None:
        from tersenet.nn.winograd_relu import WinogradReLUConv2d

        self.share = share
        for network in networks:
            for name in self.layers:
                layer = network.get_submodule(name)
                if isinstance(layer, WinogradReLUConv2d):
                    layer.spatial_share = share

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.set_share([self.model], saved["share"])

    def _masked(self, network: nn.Module) -> dict[str, MaskedWeight]:
        from tersenet.nn.masked import masked_layers

        return {name: layer for name, layer in masked_layers(network).items() if name in self.densities}

    def _scores(self, layer: MaskedWeight) -> Tensor:
        """(taps, C_in, C_out)"""
        from tersenet.nn.winograd_relu import WinogradReLUConv2d
        from tersenet.ops.weight_masks import tap_importance

        scores = layer.canonical(layer.weight.detach()).abs()
        if self.settings.score == "importance" and isinstance(layer, WinogradReLUConv2d):
            at, _, bt = layer.transforms(scores.dtype)
            scores = scores * tap_importance(at, bt)[:, None, None]
        return scores


def _networks(state: TrainState) -> list[nn.Module]:
    return [state.model] if state.ema is None else [state.model, state.ema]


def _as_spatial(layer: nn.Module) -> None:
    """The gradient of W becomes what W = G g G^T would change by, if g had its own gradient."""
    from tersenet.nn.winograd_relu import WinogradReLUConv2d
    from tersenet.ops.winograd import kronecker

    if isinstance(layer, WinogradReLUConv2d) and layer.weight.grad is not None:
        _, g, _ = layer.transforms(layer.weight.dtype)
        gram = kronecker(g @ g.t())
        layer.weight.grad = (gram @ layer.weight.grad.flatten(1)).view_as(layer.weight)
        if layer.mask is not None:
            layer.weight.grad.masked_fill_(~layer.mask, 0)
