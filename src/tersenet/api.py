"""The public functions. Each is one step of the data flow; the command line calls these and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tersenet.data.load import load_data
from tersenet.data.registry import SHAPES, DataSettings, parse
from tersenet.environment import device_named
from tersenet.errors import TersenetError
from tersenet.exporting import artifact
from tersenet.exporting.onnx import export_onnx
from tersenet.exporting.program import export_program
from tersenet.graph.copies import copied
from tersenet.graph.example import random_like
from tersenet.graph.record import InputSpec, input_of, record_of
from tersenet.measuring.layer_latency import LatencyTable
from tersenet.measuring.measure import measure as measure_network
from tersenet.measuring.workload import Workload
from tersenet.measuring.workload import workload as count_workload
from tersenet.methods.base import TrainingMethod
from tersenet.models.open import Source, example_of
from tersenet.models.usable import check_usable, unwrapped
from tersenet.pipeline import Pipeline, preview, quiet, request_of
from tersenet.recipe import Recipe, load_recipe
from tersenet.results import Accuracy, Measures, Report
from tersenet.run import Run
from tersenet.train import distributed
from tersenet.train.evaluate import evaluate as evaluate_network
from tersenet.winograd_search.layers import measured


@dataclass(frozen=True)
class Result:
    """What a run gave. `folder` is None if it was not to be kept."""

    model: nn.Module
    report: Report
    folder: Path | None = None

    def save(self, folder: Path | str) -> Path:
        """`model.json` and `model.safetensors` into `folder`; `tersenet.load` reads them."""
        return artifact.save(self.model, folder)


def compress(
    model: str | nn.Module | None,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: Any = None,
    weights: str | Path | None = None,
    target: str | None = None,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    device: str | None = None,
    seed: int | None = None,
    fresh: bool = False,
    dry_run: bool = False,
    on_event: Callable[[dict[str, Any]], None] = quiet,
    command: str | None = None,
    base: str | None = None,
    example: Any = None,
    input_shape: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Result:
    """Carry out a recipe on a network.

    Args:
        model: a name (built-in, `timm:NAME`, `torchvision:NAME`), `package.module:function`, a saved folder, or a
            module, which is not changed. None: the recipe's.
        recipe: a shipped recipe's name, a YAML file, or the same as a mapping.
        data: a data set's name, or what `tersenet.data` takes (loaders, a dict with loss and metric). None: the
            recipe's.
        weights: a state dict to start from (.safetensors, .pt, .pth, .th), read without running code.
        target: `macs=50%`, `params=0.3M`; in place of the recipe's.
        out: the run's folder. The same call with the same folder goes on where it stopped. None: nothing is kept.
        overrides: `["steps.0.rate=0.4"]`.
        device: `cpu`, `cuda`; None: a GPU if there is one. Under torchrun each process takes its own.
        fresh: remove what an earlier run left in `out`.
        dry_run: only what would be removed; no data is read and nothing is written.
        base: for a saved folder whose network started as your own: the `package.module:function` that makes it.
        example: for your own network, where no data says it: what its forward takes, a tensor (N, ...) or a tuple of
            them. Only shapes and types count; they are saved with the network.
        input_shape: the same for floating point numbers, without the batch axis: (3, 64, 64), or a list of such.

    Raises:
        TersenetError: anything in the arguments that can't be used; nothing has been changed then.
    """
    settings = load_recipe(recipe, overrides)
    if not isinstance(model, (str, nn.Module, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TersenetError(f"model must be a name, a folder or an nn.Module instance, not {model!r}")
    changes: dict[str, Any] = {"model": model if isinstance(model, str) else settings.model if model is None else None}
    if settings.model is not None and changes["model"] != settings.model:
        # The recipe's arguments are those of its own model; what was overridden is meant for this one.
        own = load_recipe(recipe).model_arguments
        changes["model_arguments"] = {k: v for k, v in settings.model_arguments.items() if own.get(k) != v}
    changes |= {k: str(v) for k, v in {"weights": weights, "target": target}.items() if v is not None}
    if isinstance(data, str):
        changes["data"] = {**(settings.data.model_dump() if settings.data else {}), "source": data}
    if seed is not None:
        changes["seed"] = seed
    settings = load_recipe({**settings.model_dump(mode="json"), **changes})
    what = model if model is not None else settings.model
    if what is None:
        raise TersenetError(f"recipe {settings.name!r} names no model: give one")
    if isinstance(what, nn.Module):
        what = unwrapped(what)
        check_usable(what, inputs=None)
        what = copied(what)
    inputs = _inputs(example, input_shape)
    source = Source(what, settings.weights, tuple(settings.model_arguments.items()), base, inputs)
    given = settings.data if data is None or isinstance(data, str) else data
    if dry_run:
        return Result(*preview(settings, source, device_named(device), *_shape_and_classes(given)))
    if given is None and any(isinstance(step, TrainingMethod) for step in settings.steps):
        raise TersenetError(f"recipe {settings.name!r} trains, and names no data: give some, such as --data digits")
    if out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TersenetError("several processes need one folder for the run: give out (--out)")
    with ExitStack() as stack:
        on = stack.enter_context(distributed.process_group(device_named(device)))
        bundle = None
        if given is not None:
            share = {"rank": distributed.rank(), "world": distributed.world()}
            bundle = load_data(given, seed=settings.seed, normalise=source.normalise, **share)
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        request = request_of(settings, source, bundle)
        run = Run(folder, request, fresh=fresh)
        pipeline = Pipeline(settings, source, bundle, run, on, on_event, source.pristine())
        final, report = pipeline.execute(command)
    return Result(final, report, Path(out) if out is not None else None)


def load(folder: str | Path, base: nn.Module | None = None) -> nn.Module:
    """A saved network, in evaluation mode, on the CPU. No pickle is read and no code of the file's maker runs.

    Args:
        base: a fresh instance of your own module, if that is what was compressed; it is changed in place.

    Raises:
        ArtifactError: not a saved network, damaged, or forged.
    """
    return artifact.load(Source(str(folder)).folder or folder, None if base is None else unwrapped(base))


def save(model: nn.Module, folder: str | Path) -> Path:
    """A network that came from `compress` or `load`, into `folder`. See `tersenet.exporting.artifact`."""
    return artifact.save(model, folder)


def measure(model: nn.Module, example: Any) -> Measures:
    """Parameters, MACs (1 = one multiply-add of a conv or linear layer), bytes, latency, peak memory for `example`."""
    return measure_network(unwrapped(model), example)


def workload(model: nn.Module, data: Any = None, samples: int = 100) -> Workload:
    """Multiplications per image, layer by layer, where zeros of sparse layers' weights and activations are skipped.

    Args:
        data: as for `evaluate`; the first `samples` test images are counted on. None: images of noise, whose
            activations say little.

    Raises:
        TersenetError: data without a test split, or a network that does not take its images.
    """
    model = unwrapped(model)
    if data is None:
        images = random_like(example_of(model, samples), seed=0)
        return count_workload(model, [(images, None)], samples)
    record = record_of(model)
    known = record.input if record is not None else None
    normalise = (known.mean, known.std) if known and known.mean and known.std else None
    bundle = load_data(data, normalise=normalise)
    if bundle.test is None:
        raise TersenetError(f"data {bundle.name!r} has no test split to count on")
    return count_workload(model, bundle.test.batches(0), samples)


def export(
    model: nn.Module, path: str | Path, example: Any, *, quantized: Literal["folded", "plain"] = "folded"
) -> Path:
    """An ExportedProgram (.pt2) or ONNX file (.onnx) for any batch size, which runs where tersenet is not installed.

    Args:
        quantized: what becomes of Winograd and quantized layers. `folded`: their weights are integers, transformed
            and rounded once; in ONNX with QuantizeLinear and DequantizeLinear. `plain`: ordinary convolutions, without
            any rounding.

    Raises:
        TersenetError: another file ending, the extra `onnx` is not installed, a full disk; a quantizer that has seen
            nothing, or with `plain` transforms that make no convolution.
        GraphError: the network can't be exported, or what was exported gives other outputs.
    """
    write = export_onnx if Path(path).suffix == ".onnx" else export_program
    return write(unwrapped(model), path, example if isinstance(example, tuple) else (example,), quantized)


def latency_table(
    model: nn.Module, example: Any, *, bits: Sequence[int | None] = (None,), batch: int = 1
) -> LatencyTable:
    """What each convolution costs on this machine: direct, F2, F4 and F6, in floating point (None) and in few bits.

    `winas` and `winograd_knapsack` choose by it: `latency_table(...).save("table.json")`, then `latency: table.json`.

    Raises:
        TersenetError: the network has no convolution.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    return measured(unwrapped(model), inputs, bits, batch)


def evaluate(
    model: str | nn.Module,
    data: Any,
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    base: str | None = None,
) -> Accuracy:
    """Accuracy on the test split of `data`, with exact counts.

    Raises:
        TersenetError: no such model or data, weights of another network, or data without a test split.
    """
    source = Source(model, str(weights) if weights is not None else None, base=base)
    place = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    with distributed.process_group(device_named(device) if device or place is None else place) as on:
        bundle = load_data(data, rank=distributed.rank(), world=distributed.world(), normalise=source.normalise)
        if bundle.test is None:
            raise TersenetError(f"data {bundle.name!r} has no test split to evaluate on")
        # A module is measured as it is: neither its record nor its mode is touched.
        known = (bundle.shape, bundle.classes, bundle.normalise)
        network = model if isinstance(model, nn.Module) and weights is None else source.open(*known)
        return evaluate_network(network, bundle.test, device=on, loss=bundle.loss, metric=bundle.metric)


def open_model(
    model: str | nn.Module, weights: str | Path | None = None, base: str | None = None, inputs: InputSpec | None = None
) -> tuple[nn.Module, tuple[int, ...]]:
    """Any named network, and the (C, H, W) of its input."""
    network = Source(model, str(weights) if weights is not None else None, base=base, inputs=inputs).open()
    record = record_of(network)
    if record is None:
        raise TersenetError(f"{model} could not be opened")
    return network, record.input.shape


def open_example(
    model: str,
    weights: str | Path | None = None,
    base: str | None = None,
    *,
    sizes: Sequence[Sequence[int]] = (),
    batch: int = 1,
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Any named network, and a batch of noise for it: of what it was made for, or of `sizes` if there are any."""
    network, _ = open_model(model, weights, base, _inputs(None, sizes or None))
    return network, random_like(example_of(network, batch), seed=0)


def _inputs(example: Any, shape: Sequence[int] | Sequence[Sequence[int]] | None) -> InputSpec | None:
    if example is not None and shape is not None:
        raise TersenetError("example and input_shape say the same thing: give one of them")
    if shape is None:
        return None if example is None else input_of(example)
    try:
        shapes = [tuple(one) if isinstance(one, Sequence) else one for one in shape]
        first, *more = shapes if shapes and isinstance(shapes[0], tuple) else [tuple(shape)]
        return InputSpec.model_validate({"shape": first, "more": [{"shape": one} for one in more]})
    except (TypeError, ValueError) as error:
        raise TersenetError(
            f"input_shape (={shape!r}) must be the sizes of one input without the batch axis, such as (3, 64, 64), or "
            "a list with one of these for each input"
        ) from error


def _shape_and_classes(data: Any) -> tuple[tuple[int, ...] | None, int | None]:
    """Of one input, for a dry run; the files of named data sets are not read."""
    if data is None:
        return None, None
    if isinstance(data, DataSettings):
        name = parse(data.source)[0]
        if name in SHAPES:
            return SHAPES[name]
    bundle = load_data(data)
    return bundle.shape, bundle.classes
