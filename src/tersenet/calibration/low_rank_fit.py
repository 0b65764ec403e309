"""One convolution split in two of lower rank: the error of every rank, and the pair fitted to what is wanted.

Everything is in the units behind the layer's batch norm, where there is one. With the ReLU behind a layer known, what
the fit gives where the wanted output is below zero only has to be below zero.

Source: Jaderberg et al. 2014 and Zhang et al. 2016; their use one after the other, and the refit of the horizontal
convolution, from He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersenet.calibration.low_rank_layers import Splittable
from tersenet.calibration.readers import Reader, next_operator, through_norm
from tersenet.calibration.refit import ridge_of, set_means
from tersenet.calibration.sampling import has_intercept
from tersenet.graph.model import ModelGraph
from tersenet.nn.low_rank import Form
from tersenet.ops.gram import Moments, StatisticsError
from tersenet.ops.least_squares import error_curve, error_of, fit
from tersenet.ops.low_rank import SpatialDecomposition, composed, reduced_rank, spatial_decomposition
from tersenet.ops.relu_fit import relu_fit

_NO_SCALE = 1e-4  # of a batch norm's largest: outputs with a smaller one become constant


@dataclass(frozen=True)
class Pair:
    """`first` (rank, C, ...) and `second` (O, rank, ...) with `whole` (O, C, kh, kw), the one weight that they are
    together, and `features` (F, O): what makes the outputs of the features that were fitted. `intercept` (O,)."""

    first: Tensor
    second: Tensor
    whole: Tensor
    features: Tensor
    intercept: Tensor
    error: float


class Splitting(ABC):
    """A layer of a network in one of the two forms. `weight` (O, C, kh, kw), float64, behind the norm.

    Features are linear in what the layer reads: one row of inputs gives one row of F features.
    """

    def __init__(self, graph: ModelGraph, layer: Splittable) -> None:
        self.layer, self.reader = layer, layer.reader
        weight = graph.model.get_parameter(f"{layer.name}.weight").detach().double()
        if not bool(weight.isfinite().all()):
            raise StatisticsError(f"the weights of {layer.name!r} hold values that are NaN or infinite.")
        affine = through_norm(graph.model, layer.reader)
        self.weight = weight if affine is None else weight * affine[0].view(-1, 1, 1, 1)
        self.has_intercept = has_intercept(graph.model, layer.reader)

    @abstractmethod
    def features(self, x: Tensor, rank: int) -> Tensor:
        """(N, C * kh * kw) -> (N, F): all that a pair of this rank can be made of."""

    @abstractmethod
    def errors(self, moments: Moments) -> Tensor:
        """(size,) float64: the share of the wanted outputs' variance that ranks 0, 1, ... size - 1 miss, of the moments
        of the features of rank size - 1. One factorisation gives all."""

    @abstractmethod
    def linear(self, moments: Moments, rank: int) -> Pair:
        """The least squares fit, from moments of features of this rank or above."""

    @abstractmethod
    def behind_relu(self, x: Tensor, y: Tensor, rank: int) -> Pair:
        """The fit that is right behind the ReLU, from all rows of features (N, F) and wanted outputs (N, O)."""

    @abstractmethod
    def data_free(self, moments: Moments, rank: int) -> float:
        """The error of the pair nearest to the weight, with the best bias."""

    def empty(self, rank: int) -> Moments:
        """Of the features of a rank."""
        width = self.features(torch.zeros(1, self.weight[0].numel()), rank).shape[1]
        return Moments(self.layer.name, width, len(self.weight))

    def add(self, moments: Moments, x: Tensor, y: Tensor) -> None:
        """Take in rows of features and wanted outputs."""
        moments.add(x, y)
        if not self.has_intercept:
            # Mirrored rows have the mean zero, so that the best intercept is none.
            moments.add(-x, -y)


class Spatial(Splitting):
    """Features are what the vertical convolution gives where one output reads: kw values of each of its filters."""

    def __init__(self, graph: ModelGraph, layer: Splittable) -> None:
        super().__init__(graph, layer)
        self.taps = self.weight.shape[3]
        self.decomposed: SpatialDecomposition = spatial_decomposition(self.weight)

    def features(self, x: Tensor, rank: int) -> Tensor:
        vertical = self.decomposed.left[:, :rank].to(x)
        wide = x.view(len(x), len(vertical), self.taps).transpose(1, 2) @ vertical
        return wide.transpose(1, 2).flatten(1)

    def errors(self, moments: Moments) -> Tensor:
        return error_curve(moments, torch.arange(self.layer.size - 1), self.taps).cpu()

    def linear(self, moments: Moments, rank: int) -> Pair:
        columns = torch.arange(rank * self.taps)
        ridge = ridge_of(moments.rows // (1 if self.has_intercept else 2), len(columns))
        done = fit(moments, columns, prior=self._horizontal(rank).flatten(1), ridge=ridge)
        return self._pair(rank, done.weight, done.bias, done.error)

    def behind_relu(self, x: Tensor, y: Tensor, rank: int) -> Pair:
        prior, ridge = self._horizontal(rank).flatten(1), ridge_of(len(x), x.shape[1])
        done = relu_fit(self.layer.name, x, y, prior=prior, ridge=ridge)
        return self._pair(rank, done.weight, done.bias, done.error)

    def data_free(self, moments: Moments, rank: int) -> float:
        return error_of(moments, self._horizontal(rank), torch.arange(rank * self.taps))

    def _horizontal(self, rank: int) -> Tensor:
        return self.decomposed.pair(rank)[1]

    def _pair(self, rank: int, weight: Tensor, intercept: Tensor, error: float) -> Pair:
        first = self.decomposed.pair(rank)[0]
        second = weight.to(first).view(-1, rank, 1, self.taps)
        return Pair(first, second, composed(first, second), weight.T, intercept, error)


class Channel(Splitting):
    """Features are the layer's own responses in the network as it is, without the bias."""

    def features(self, x: Tensor, rank: int) -> Tensor:
        return x @ self.weight.flatten(1).T.to(x)

    def errors(self, moments: Moments) -> Tensor:
        return reduced_rank(moments).errors[: self.layer.size].cpu()

    def linear(self, moments: Moments, rank: int) -> Pair:
        found = reduced_rank(moments)
        left, right, intercept = found.fit(min(rank, len(found.right)))
        error = float(found.errors[min(rank, len(found.right))])
        return self._pair(rank, left, right, intercept, error)

    def behind_relu(self, x: Tensor, y: Tensor, rank: int) -> Pair:
        done = relu_fit(self.layer.name, x, y, rank=rank)
        return self._pair(rank, done.left, done.right, done.bias, done.error)

    def data_free(self, moments: Moments, rank: int) -> float:
        filters = self.weight.flatten(1).to(moments.xx)
        vectors = torch.linalg.eigh(filters @ filters.T).eigenvectors[:, -rank:]
        return error_of(moments, vectors @ vectors.T)

    def _pair(self, rank: int, left: Tensor, right: Tensor, intercept: Tensor, error: float) -> Pair:
        # Responses that are linearly dependent give fewer columns than were asked for.
        short = rank - left.shape[1]
        map_ = left @ right
        left, right = nn.functional.pad(left, (0, short)), nn.functional.pad(right, (0, 0, 0, short))
        first = torch.tensordot(left.T.to(self.weight), self.weight, 1)
        second = right.T.to(self.weight)
        return Pair(first, second[:, :, None, None], torch.tensordot(second, first, 1), map_, intercept, error)


FORMS: dict[Form, type[Spatial] | type[Channel]] = {"spatial": Spatial, "channel": Channel}


def relu_follows(graph: ModelGraph, reader: Reader) -> bool:
    """Whether a ReLU alone reads what the layer, with its norm, gives."""
    if len(reader.uses) != 1 or reader.sum is not None:
        return False
    op = graph.trace.ops[reader.uses[0]]
    behind = next_operator(graph, op.result)
    if behind is not None and reader.norm is not None:
        behind = next_operator(graph, behind.result[0])
    return behind is not None and behind.name == "relu"


@torch.no_grad()
def install(graph: ModelGraph, splitting: Splitting, pair: Pair, moments: Moments) -> tuple[Tensor, Tensor]:
    """Write a pair into the network that is worked on, as one weight, with its bias or batch norm.

    Returns the two weights for the layers that come in its place.
    """
    reader = splitting.reader
    module = graph.model.get_submodule(reader.layer)
    weight = graph.model.get_parameter(f"{reader.layer}.weight")
    affine = through_norm(graph.model, reader)
    scale = torch.ones_like(splitting.weight[:, 0, 0, 0]) if affine is None else affine[0]
    usable = scale.abs() > _NO_SCALE * scale.abs().amax()
    back = torch.where(usable, 1 / scale, 0.0)
    features = pair.features.to(back)
    count = len(features)  # a pair of lower rank uses the first of the features
    mean = moments.mean_x[:count].to(back) @ features
    variance = ((moments.xx[:count, :count].to(back) @ features) * features).sum(0) / moments.rows
    weight.copy_(pair.whole.to(back) * back.view(-1, 1, 1, 1))
    wanted = mean + pair.intercept.to(back)
    set_means(graph, reader, module, usable, mean * back, variance * back.square(), wanted)
    if reader.norm is not None and not bool(usable.all()):
        # Outputs that the norm makes constant give nothing but their bias now, and that is their mean.
        running = graph.model.get_buffer(f"{reader.norm[0]}.running_mean")
        bias = dict(module.named_parameters()).get("bias")
        running[~usable] = 0.0 if bias is None else bias[~usable].to(running)
    return pair.first, pair.second.to(back) * back.view(-1, 1, 1, 1)
