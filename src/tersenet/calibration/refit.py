"""One layer: what its inputs contribute, the error of every choice of them, and its weights fitted anew to some.

Everything is in the units behind the layer's batch norm, where there is one: there the residual sum takes place, and a
channel whose scale is near zero counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.calibration.readers import Reader, outputs_left, owners, through_norm, units_read
from tersenet.calibration.sampling import Statistics, has_intercept
from tersenet.graph.labels import IntArray, NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.ops.contributions import Contributions, contributions
from tersenet.ops.gram import Moments
from tersenet.ops.least_squares import Fit, channel_columns, error_curve, error_of, fit

_NO_SCALE = 1e-4
"""Of the largest scale of a batch norm: outputs with a smaller one are left as they are."""

_FEW = 4  # rows for each input below which a fit without a ridge says nothing about one with it
_ASKED = (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)  # shares of the channels
_ROWS_EACH = 100  # rows for each input from which on a fit needs no ridge
_PULL = 1.0  # ridge for one row for each input


@dataclass(frozen=True)
class _Part:
    """One group of a convolution with what was seen of it: `weight` (outputs left, inputs, *kernel) behind the norm,
    and the units of its inputs."""

    moments: Moments
    weight: Tensor
    units: IntArray
    group: int

    @property
    def taps(self) -> int:
        return self.weight[0, 0].numel()

    def without(self, gone: NDArrayBool) -> Tensor:
        """The weight with zeros for inputs that are gone: they may have been there when the moments were taken."""
        return self.weight.clone().index_fill_(1, _places(gone[self.units], self.weight), 0)


def _parts(graph: ModelGraph, reader: Reader, found: Statistics, gone: NDArrayBool) -> list[_Part]:
    weight = _scaled(graph.model, reader)
    weights = weight.view(reader.groups, -1, *weight.shape[1:])
    left = outputs_left(graph, reader, gone).view(reader.groups, -1).to(weight.device)
    units = units_read(graph, reader)
    return [
        _Part(moments.of_outputs(left[group]), weights[group][left[group]], units[group], group)
        for group, moments in enumerate(found)
        if bool(left[group].any())
    ]


def _places(chosen: NDArrayBool, like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(chosen)).to(like.device)


def _scaled(model: nn.Module, reader: Reader) -> Tensor:
    weight = model.get_parameter(f"{reader.layer}.weight").detach().double()
    affine = through_norm(model, reader)
    return weight if affine is None else weight * affine[0].view(-1, *[1] * (weight.dim() - 1))


def contribution(
    graph: ModelGraph, reader: Reader, found: Statistics, wanted: IntArray, gone: NDArrayBool
) -> Contributions:
    """What each of the units `wanted` contributes to a layer; whatever else it reads and is not `gone` stays.

    The energy is that of all it should give: what the other units explain does not make these count for more.
    """
    parts = _parts(graph, reader, found, gone)
    each = [
        contributions(part.moments, part.without(gone)).of_units(owners(part.units, wanted), len(wanted))
        for part in parts
    ]
    gram, target = torch.stack([c.gram for c in each]).sum(0), torch.stack([c.target for c in each]).sum(0)
    energy = sum(part.moments.energy for part in parts)
    return Contributions(gram, target, energy, max(part.moments.precision for part in parts))


def curve(
    graph: ModelGraph, reader: Reader, found: Statistics, wanted: IntArray, order: Tensor, gone: NDArrayBool
) -> Tensor:
    """(units + 1,) float64: the error of a layer fitted to the first 0, 1, ... of the units `wanted` in `order`."""
    missed, energy = torch.zeros(len(wanted) + 1, dtype=torch.float64), 0.0
    for part in _parts(graph, reader, found, gone):
        owner = owners(part.units, wanted)
        place = torch.empty(len(wanted), dtype=torch.long)
        place[order] = torch.arange(len(wanted))
        rank = torch.where(owner >= 0, place[owner.clamp(min=0)], -1)
        rank[torch.from_numpy(gone[part.units])] = len(wanted)
        channels = torch.sort(rank, stable=True).indices[: int((rank < len(wanted)).sum())]
        errors = _errors(part, channels, _rows(graph, reader, part.moments))
        counts = torch.stack([(rank < k).sum() for k in range(len(wanted) + 1)])
        missed += errors[counts] * part.moments.energy
        energy += part.moments.energy
    return missed / energy if energy else missed


def _errors(part: _Part, channels: Tensor, rows: int) -> Tensor:
    """(K + 1,) float64: the error of a fit to the first 0, 1, ... of the channels.

    With few rows least squares without the ridge would seem to miss nothing; the fit with its ridge is then asked at a
    few counts.
    """
    if rows >= _FEW * len(channels) * part.taps:
        return error_curve(part.moments, channels, part.taps).cpu()
    counts = sorted({round(share * len(channels)) for share in _ASKED})
    errors = [_fit(part, channels[:count].sort().values, rows).error if count else 1.0 for count in counts]
    between = np.interp(np.arange(len(channels) + 1), counts, np.minimum.accumulate(errors))
    return torch.from_numpy(between)


def _fit(part: _Part, kept: Tensor, rows: int) -> Fit:
    columns = channel_columns(kept, part.taps)
    prior = part.weight[:, kept.to(part.weight.device)].flatten(1)
    return fit(part.moments, columns, prior=prior, ridge=ridge_of(rows, len(columns)))


def _rows(graph: ModelGraph, reader: Reader, moments: Moments) -> int:
    """Without an intercept every row was added twice, mirrored."""
    return moments.rows // (1 if has_intercept(graph.model, reader) else 2)


def refit(
    graph: ModelGraph, reader: Reader, found: Statistics, left_out: Sequence[NDArrayBool], gone: NDArrayBool
) -> tuple[float, list[str]]:
    """Fit a layer to the inputs that are not `left_out` (one mask for each group), and write it into the network.

    Its weights for the others become zero. Returns the share of the wanted outputs' variance that is missed, and what
    is to be said of the fit.
    """
    module = graph.model.get_submodule(reader.layer)
    weight = graph.model.get_parameter(f"{reader.layer}.weight")
    affine = through_norm(graph.model, reader)
    new = weight.detach().double().view(reader.groups, -1, *weight.shape[1:]).clone()
    left = outputs_left(graph, reader, gone).view(reader.groups, -1).to(weight.device)
    scale = new.new_ones(new.shape[:2]) if affine is None else affine[0].view(reader.groups, -1)
    usable = left & (scale.abs() > _NO_SCALE * scale.abs().amax())
    mean, variance, target = (torch.zeros_like(scale) for _ in range(3))
    missed, energy, notices = 0.0, 0.0, list[str]()
    for part in _parts(graph, reader, found, gone):
        out = torch.from_numpy(left_out[part.group])
        kept = torch.nonzero(~out)[:, 0]
        done = _fit(part, kept, _rows(graph, reader, part.moments))
        rows, chosen = left[part.group], usable[part.group]
        within = chosen[rows]
        fitted = torch.zeros_like(part.weight)
        fitted[:, kept.to(weight.device)] = done.weight.to(weight.device).view(
            len(part.weight), len(kept), *weight.shape[2:]
        )
        raw = fitted[within] / scale[part.group][chosen].view(-1, *[1] * (weight.dim() - 1))
        new[part.group, chosen] = raw
        new[part.group][:, out.to(weight.device)] = 0
        flat = raw.flatten(1)
        mean[part.group, chosen] = flat @ part.moments.mean_x.to(flat)
        variance[part.group, chosen] = ((flat @ part.moments.xx.to(flat)) * flat).sum(1) / part.moments.rows
        target[part.group, chosen] = part.moments.mean_y.to(flat)[within]
        missed += done.error * part.moments.energy
        energy += part.moments.energy
        notices += [done.notice] if done.notice else []
    with torch.no_grad():
        weight.copy_(new.view(weight.shape))
        set_means(graph, reader, module, usable.flatten(), mean.flatten(), variance.flatten(), target.flatten())
    return (missed / energy if energy else 0.0), notices


def ridge_of(rows: int, inputs: int) -> float:
    """The pull to the old weights, in units of the inputs' mean sum of squares.

    With few rows for each input, least squares follow what is peculiar to these images.
    """
    return _PULL * inputs / rows if rows < _ROWS_EACH * inputs else 0.0


def set_means(
    graph: ModelGraph, reader: Reader, module: nn.Module, usable: Tensor, mean: Tensor, variance: Tensor, target: Tensor
) -> None:
    """Make the outputs' means those that were wanted: by the bias, or by the batch norm behind.

    The norm's statistics become those of the new outputs and its scale goes with its deviation, so that the network is
    the same with the statistics of a batch, in training, as with the stored ones.
    """
    bias = module.bias
    if reader.norm is None:
        if isinstance(bias, Tensor):
            bias[usable] = (target - mean)[usable].to(bias)
        return
    norm = graph.model.get_submodule(reader.norm[0])
    running_mean, running_var = norm.running_mean, norm.running_var
    assert isinstance(running_mean, Tensor)
    assert isinstance(running_var, Tensor)
    if isinstance(bias, Tensor):
        mean = mean + bias.double()
    weight, beta = norm.weight, norm.bias
    if isinstance(weight, Tensor) and isinstance(beta, Tensor):
        eps = float(norm.eps)  # pyright: ignore[reportArgumentType]
        growth = ((variance + eps) / (running_var.double() + eps)).sqrt()
        weight[usable] = (weight.double() * growth)[usable].to(weight)
        running_var[usable] = variance[usable].to(running_var)
        beta[usable] = target[usable].to(beta)
        running_mean[usable] = mean[usable].to(running_mean)
        return
    scale = (running_var.double() + float(norm.eps)).rsqrt()  # pyright: ignore[reportArgumentType]
    running_mean[usable] = (mean - target / scale)[usable].to(running_mean)


def plain_error(
    graph: ModelGraph, reader: Reader, found: Statistics, left_out: Sequence[NDArrayBool], gone: NDArrayBool
) -> float:
    """The share of the variance that is missed with the weights as they are, and the best bias."""
    missed, energy = 0.0, 0.0
    for part in _parts(graph, reader, found, gone):
        kept = torch.from_numpy(np.flatnonzero(~left_out[part.group]))
        weight = part.weight[:, kept.to(part.weight.device)].flatten(1)
        missed += error_of(part.moments, weight, channel_columns(kept, part.taps)) * part.moments.energy
        energy += part.moments.energy
    return missed / energy if energy else 0.0
