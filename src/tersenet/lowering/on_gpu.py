"""Lowering for a GPU: folding and fusion as on a CPU, and then cuDNN or Triton's kernels for each layer, as measured.

The network is measured as it is called: with few images, the time that Python takes to start kernels counts too.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.graph.copies import copied
from tersenet.graph.example import random_like
from tersenet.graph.precision import full_float32
from tersenet.graph.trace import evaluating
from tersenet.kernels.gpu.host import interpreted, problem
from tersenet.kernels.gpu.operator import gpu_winograd_conv2d
from tersenet.kernels.gpu.pack import DTYPES, GpuAlgorithm, GpuPacked, pack_gpu, pack_gpu_domain
from tersenet.kernels.gpu.timing import timed
from tersenet.kernels.winograd import BOUNDS
from tersenet.lowering.activations import ACTIVATIONS
from tersenet.lowering.assign import channels_last, distance, run_graph, sizes_of
from tersenet.lowering.fold import fold_affine
from tersenet.lowering.fuse import fuse
from tersenet.lowering.layers import AnyLayer, DomainLayer, Layer, Pair
from tersenet.lowering.lower import Lowered, operator_name, owned
from tersenet.lowering.program import program
from tersenet.lowering.report import LoweredLayer, LoweredReport
from tersenet.lowering.verdict import LOWERED, ORDERED, ORIGINAL, compared, faster_than_lowered, in_order
from tersenet.measuring.turns import called_in_turns

KERNELS = {
    "F2": (2, "triton"),
    "F4": (4, "triton"),
    "F6": (6, "triton"),
    "F2 tf32x3": (2, "triton-tf32x3"),
    "F4 tf32x3": (4, "triton-tf32x3"),
}
"""Choice -> m, and how float32 numbers are multiplied."""
SPARSE = "sparse"
CHOICES = ("torch", *KERNELS, SPARSE)
_MARGIN = 0.95  # Winograd's kernels round more, so they have to be faster by more than the measurement's own spread
_LAYER_ERROR, _HALF_LAYER_ERROR = 1e-4, 1e-2
_ERROR, _HALF_ERROR = 1e-3, 5e-2
_ROUNDS, _PASSES = 15, 30

Made = Callable[..., Tensor]


class TritonConvolution(nn.Module):
    """A Triton kernel, with its weight packed once."""

    def __init__(self, packed: GpuPacked, padding: Pair, activation: str) -> None:
        super().__init__()
        self._packed, self._padding = packed, padding
        self._function = None if activation in BOUNDS else ACTIVATIONS[activation]
        self._activation = activation if self._function is None else "none"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = gpu_winograd_conv2d(x, self._packed, self._padding, residual, self._activation)
        return y if self._function is None else self._function(y)

    def __deepcopy__(self, memo: dict[int, Any]) -> TritonConvolution:
        return self  # it never changes


def lower_on_gpu(model: nn.Module, inputs: tuple[Tensor, ...], choice: str | None, tolerance: float | None) -> Lowered:
    """`lower` for a network on a CUDA device. Raises: as `lower`."""
    check(model, inputs, choice)
    device, dtype = inputs[0].device, inputs[0].dtype
    limit = tolerance if tolerance is not None else _ERROR if dtype == torch.float32 else _HALF_ERROR
    notes: list[str] = []
    own: str = _cudnn().fp32_precision  # with TF32, cuDNN may stay the fastest
    with full_float32(), torch.no_grad(), _current(device):
        made = program(model, inputs)
        folded = fold_affine(made)
        layers = fuse(made, dtype=dtype)
        graph = owned(made)
        noise = random_like(inputs, seed=0)
        sizes = sizes_of(graph, layers, noise)
        offered = kernels_offered(layers.values(), choice, dtype, notes, device)
        found: dict[str, LoweredLayer] = {}

        def judged(target: str) -> Callable[..., None]:
            def judge(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                layer = layers[target]
                kernels = {name: build(layer, name, dtype, device) for name in offered if fits(layer, name)}
                with convolutions(own):
                    times = measured({**kernels, "torch": module}, args) if choice is None else {}
                ranked = sorted(times, key=lambda name: times[name] / (1 if name == "torch" else _MARGIN))
                rejected: list[str] = []
                for name in [*(ranked or kernels), "torch"]:
                    error = 0.0 if name == "torch" else distance(kernels[name](*args), output)
                    if name == "torch" or error <= (_LAYER_ERROR if dtype == torch.float32 else _HALF_LAYER_ERROR):
                        density = layer.density if isinstance(layer, DomainLayer) else None
                        taken = (sizes[target], name, times, error, density, tuple(rejected))
                        found[target] = LoweredLayer(layer.name, layer.kind, *taken)
                        graph.add_module(target, kernels.get(name, module))
                        return
                    rejected.append(name)

            return judge

        with ExitStack() as stack:
            # Every layer is judged on what it really reads: the plain network's activations.
            for target in layers:
                handle = graph.get_submodule(target).register_forward_hook(judged(target))
                stack.callback(handle.remove)
            run_graph(graph, noise)
        other = Counter(operator_name(node) for node in graph.graph.nodes if node.op == "call_function")
        for name in ("sym_size", "getitem"):
            other.pop(name, None)
        batch, error = len(inputs[0]), compared(model, graph, noise, limit)
        with convolutions(own):
            times = passes(model, graph, noise) if choice is None else {}
        best = faster_than_lowered(times) if times else None
    used = torch.get_num_threads()
    if best is not None:
        notes.append("the network itself was faster than lowered, so it stays as it was")
        report = LoweredReport((), 0.0, 0, {}, batch, used, tuple(notes), times, True)
        if best == ORDERED:
            return Lowered(in_order(model), inputs, report)
        return Lowered(copied(model).eval().requires_grad_(False), inputs, report, lambda x: x)
    layered = tuple(found[target] for target in layers)
    return Lowered(graph, inputs, LoweredReport(layered, error, folded, dict(other), batch, used, tuple(notes), times))


def check(model: nn.Module, inputs: tuple[Tensor, ...], choice: str | None) -> None:
    """Raises: TersenetError for types or devices that differ, or an unknown choice."""
    if choice is not None and choice not in CHOICES:
        raise UnknownNameError("choice", choice, CHOICES, f"Known on a GPU: {', '.join(CHOICES)}")
    device, dtype = inputs[0].device, inputs[0].dtype
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in [*named, *((f"input {number} of the example", x) for number, x in enumerate(inputs))]:
        other = tensor.is_floating_point() and (tensor.dtype != dtype or dtype not in DTYPES)
        if tensor.device != device or other:
            raise TersenetError(
                f"{name} is {tensor.dtype} on {tensor.device} and input 0 {dtype} on {device}; on a GPU all of a "
                f"network and its example must be on one device and of one type, one of {', '.join(map(str, DTYPES))}"
            )


def kernels_offered(
    layers: Collection[AnyLayer], choice: str | None, dtype: torch.dtype, notes: list[str], device: torch.device
) -> list[str]:
    """The Triton choices to try; why there are none goes into `notes`."""
    exact = [name for name in CHOICES[1:] if dtype == torch.float32 or "tf32" not in name]
    offered = [choice] if choice in exact else exact if choice is None else []
    if not any(fits(layer, name) for layer in layers for name in offered):
        return []
    for layer in layers:
        if isinstance(layer, DomainLayer) and layer.hindrance is not None:
            notes.append(f"no Triton kernels for {layer.name}: {layer.hindrance}")
        elif isinstance(layer, DomainLayer) and layer.threshold:
            notes.append(f"no Triton kernels for {layer.name}: they know no threshold")
    if reason := problem(None if interpreted() else device):
        notes.append(f"no Triton kernels: {reason}")
        return []
    return offered


def fits(layer: AnyLayer, choice: str) -> bool:
    """Whether the Triton kernel `choice` can compute this."""
    if isinstance(layer, DomainLayer):
        own = layer.density < 1 if choice == SPARSE else KERNELS[choice][0] == layer.geometry.tile
        return own and layer.hindrance is None and not layer.threshold
    return isinstance(layer, Layer) and choice in KERNELS and layer.fits_winograd


def build(layer: AnyLayer, choice: str, dtype: torch.dtype, device: torch.device) -> TritonConvolution:
    """The Triton kernel `choice` for `layer`, which fits it."""
    if isinstance(layer, DomainLayer):
        assert layer.points is not None
        isa = "triton" if choice == SPARSE else KERNELS[choice][1]
        algorithm = GpuAlgorithm(layer.geometry.tile, dtype, isa, layer.points, layer.relu)
        packed = pack_gpu_domain(layer.weight, layer.bias, algorithm, device, choice == SPARSE)
        return TritonConvolution(packed, layer.sides, layer.activation)
    assert isinstance(layer, Layer)
    packed = pack_gpu(layer.weight, layer.bias, GpuAlgorithm(KERNELS[choice][0], dtype, KERNELS[choice][1]), device)
    return TritonConvolution(packed, layer.padding, layer.activation)


def measured(kernels: dict[str, nn.Module], args: tuple[Tensor, ...]) -> dict[str, float]:
    """Median milliseconds of each, in turns, on what the layer reads; the first two passes compile and don't count."""
    timers = {name: partial(timed, partial(kernel, *args)) for name, kernel in kernels.items()}
    called_in_turns(timers, 2)
    return {name: statistics.median(taken) for name, taken in called_in_turns(timers, _ROUNDS).items()}


def passes(model: nn.Module, graph: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Median milliseconds of the network lowered, as it was, and in channels-last memory, in turns."""
    images = tuple(map(channels_last, inputs))
    ordered = in_order(model)
    runs = {LOWERED: partial(graph, *images), ORIGINAL: partial(model, *inputs), ORDERED: partial(ordered, *images)}
    with evaluating(model):
        timers = {name: partial(timed, run) for name, run in runs.items()}
        called_in_turns(timers, 2)
        return {name: statistics.median(taken) for name, taken in called_in_turns(timers, _PASSES).items()}


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one; Triton's interpreter has the CPU's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cudnn() -> Any:
    """Its settings for convolutions, which type checkers don't see."""
    return getattr(torch.backends.cudnn, "conv")  # noqa: B009


@contextmanager
def convolutions(precision: str) -> Generator[None]:
    """cuDNN's convolutions of float32 numbers with the precision that the user has set."""
    place = _cudnn()
    before, place.fp32_precision = place.fp32_precision, precision
    try:
        yield
    finally:
        place.fp32_precision = before
