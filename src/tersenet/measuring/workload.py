"""How many multiplications a network needs where zero weights and zero activations are skipped.

For each layer with a weight in the Winograd domain, with V what meets the weight W in each tap and channel:

    exact = sum over taps and C_in of (places with V != 0) * (output channels with W != 0)
    by means = places * size of W * density of V * density of W

Both per image, as the paper counts: transforms, which are additions for F(2, 3), are not. Two baselines stand beside,
both with dense weights and zero activations skipped: the direct convolution behind an ordinary ReLU, and the Winograd
convolution behind one (`native`). Other convolutions and linear layers count as dense, but masked ones by their mask.

Source: Liu et al., ICLR 2018, section 4 (densities, reduction 2.25 / (d_w d_a) for F(2, 3)).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.measuring.macs import layer_table
from tersenet.measuring.meta import call
from tersenet.nn.masked import MaskedConv2d, MaskedLinear, MaskedWeight
from tersenet.nn.winograd_relu import WinogradReLUConv2d, sides_of
from tersenet.ops.winograd_relu import Activation


@dataclass(frozen=True)
class WorkloadRow:
    """One layer, multiplications per image. `dense`: by direct convolution; densities are of what is multiplied."""

    name: str
    kind: str
    weights: int
    weight_density: float
    activation_density: float
    dense: int
    exact: float
    by_means: float
    spatial: float | None = None
    """The direct convolution, or linear layer, with dense weights behind a ReLU, zero activations skipped."""
    native: float | None = None
    """The same of Winograd convolution."""


@dataclass(frozen=True)
class Workload:
    """The layers in the order in which they run, counted on so many images."""

    rows: list[WorkloadRow]
    images: int

    def total(self, column: str, sparse_only: bool = False) -> float:
        """Of a column; where a layer has none its exact count."""
        rows = [row for row in self.rows if not sparse_only or row.kind != "dense"]
        return sum(float(row.exact) if (value := getattr(row, column)) is None else value for row in rows)

    def document(self) -> dict[str, Any]:
        """Plain values, with the totals of every column."""
        columns = ("dense", "exact", "by_means", "spatial", "native")
        totals = {only: {c: self.total(c, only == "sparse") for c in columns} for only in ("sparse", "all")}
        return {"images": self.images, "rows": [asdict(row) for row in self.rows], "totals": totals}


@dataclass
class _Count:
    """Sums over images. `places`: values of V, all and not zero."""

    places: int = 0
    used: int = 0
    exact: int = 0
    whole: int = 0
    baselines: dict[str, int] = field(default_factory=dict[str, int])


@torch.no_grad()
def workload(model: nn.Module, batches: Iterable[tuple[Any, Any]], images: int) -> Workload:
    """The workload on the first `images` of batches of (inputs, targets). The network is not changed.

    Raises: TersenetError as `layer_table`, and for batches of named inputs.
    """
    counts: dict[str, _Count] = {}
    handles: list[Any] = []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MaskedWeight)}
    for name, layer in layers.items():
        counts[name] = _Count()
        handles.append(layer.register_forward_pre_hook(_counter(counts[name])))
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen, example = 0, None
    try:
        model.eval()
        for inputs, _ in batches:
            if isinstance(inputs, dict):
                raise TersenetError("the workload is counted on one tensor or several in order, not on a dict")
            some = [x[: images - seen].to(device) for x in (inputs if isinstance(inputs, (tuple, list)) else [inputs])]
            call(model, tuple(some))
            example = example or tuple(x[:1] for x in some)
            seen += len(some[0])
            if seen >= images:
                break
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    costs = layer_table(model, example) if example is not None else {}
    rows = [_row(name, cost, layers.get(name), counts.get(name), seen) for name, cost in costs.items()]
    return Workload(rows, seen)


def _row(name: str, cost: Any, layer: MaskedWeight | None, count: _Count | None, images: int) -> WorkloadRow:
    if layer is None or count is None or not count.places:
        return WorkloadRow(name, "dense", cost.params, 1.0, 1.0, cost.macs, float(cost.macs), float(cost.macs))
    kind = "linear" if isinstance(layer, MaskedLinear) else "spatial"
    if isinstance(layer, WinogradReLUConv2d):
        kind = "winograd_relu" if layer.settings.relu else "native"
    density = layer.density
    used = count.used / count.places
    per_image = {key: value / images for key, value in count.baselines.items()}
    return WorkloadRow(
        name, kind, layer.weight.numel(), density, used, cost.macs, count.exact / images,
        count.whole / images * density * used, per_image.get("spatial"), per_image.get("native"),
    )  # fmt: skip


def _counter(count: _Count) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MaskedWeight)
        # One image after the other, so that what is transient stays small.
        for x in inputs[0].split(1):
            _count(count, layer, x)

    return hook


def _count(count: _Count, layer: MaskedWeight, x: Tensor) -> None:
    kept = layer.canonical(layer.weight).ne(0)
    if layer.mask is not None:
        kept = kept & layer.canonical(layer.mask)
    outputs = kept.shape[2]
    if isinstance(layer, WinogradReLUConv2d):
        used = layer.transformed(x).ne(0)
        relu = x.clamp(min=0) if layer.settings.relu else x
        at = layer.geometry
        r = layer.kernel_size
        spatial = _patches(relu, (r, r), (1, 1), (1, 1), at.padding)
        native = layer.transformed(relu, Activation(False)).ne(0)
        baselines = {"spatial": int(spatial.sum()) * outputs, "native": int(native.sum()) * outputs}
    elif isinstance(layer, MaskedLinear):
        used = x.reshape(1, -1, x.shape[-1]).ne(0)
        baselines = {"spatial": int(used.sum()) * outputs}
    else:
        assert isinstance(layer, MaskedConv2d)
        left, right, top, bottom = sides_of(layer)
        used = _patches(x, layer.kernel_size, layer.stride, layer.dilation, ((top, bottom), (left, right)))
        baselines = {"spatial": int(used.sum()) * outputs}
    count.places += used.numel()
    count.used += int(used.sum())
    count.whole += used.numel() * outputs
    count.exact += int((used.sum(1) * kept.sum(2)).sum())
    for key, value in baselines.items():
        count.baselines[key] = count.baselines.get(key, 0) + value


def _patches(x: Tensor, kernel: Any, stride: Any, dilation: Any, padding: Any) -> Tensor:
    """(taps, P, C_in): which of the values that a direct convolution multiplies are not zero; the padding's are."""
    (top, bottom), (left, right) = padding
    padded = nn.functional.pad(x.ne(0).float(), (left, right, top, bottom))
    taps = nn.functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    return taps.unflatten(1, (x.shape[1], -1)).permute(2, 0, 3, 1).flatten(1, 2).ne(0)
