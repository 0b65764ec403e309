"""From whatever names a network (a name, a saved folder, a function, a module) to one with a record."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet.data.registry import NORMALISATION, MeanStd
from tersenet.errors import TersenetError
from tersenet.exporting.artifact import is_artifact, load, read_manifest
from tersenet.graph.copies import copied
from tersenet.graph.record import InputSpec, Record, attach, record_of
from tersenet.models import zoo
from tersenet.models.build import build, build_custom
from tersenet.models.registry import ENTRIES, entry, in_zoo
from tersenet.models.usable import unwrapped
from tersenet.models.weights import load_weights, published

DEFAULT_SHAPE = (3, 224, 224)


@dataclass(frozen=True)
class Source:
    """A network that is not built yet: what names it, and what is known of it before its data is.

    `normalise` is what its weights were trained with, if that is known. `base` is the `package.module:function` of a
    saved folder whose network started as a user's own: a file alone never makes us run code. `inputs` is what forward
    takes, where the caller says so.
    """

    what: str | nn.Module
    weights: str | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    base: str | None = None
    inputs: InputSpec | None = None

    @property
    def name(self) -> str:
        return self.what if isinstance(self.what, str) else type(self.what).__name__

    @property
    def folder(self) -> Path | None:
        """The saved folder that is named; of a run's folder, its final model. A built-in name is never a folder."""
        if isinstance(self.what, nn.Module) or self.what in ENTRIES or in_zoo(self.what):
            return None
        if not os.path.isdir(self.what):
            return None
        folder = Path(self.what)
        if not is_artifact(folder) and (folder / "run.json").is_file():
            if not is_artifact(folder / "model"):
                raise TersenetError(f"{folder} is a run that has not finished: run its command again, it goes on")
            return folder / "model"
        return folder

    @property
    def record(self) -> Record | None:
        """The record of a saved folder, or of a module that tersenet made."""
        if isinstance(self.what, nn.Module):
            return record_of(self.what)
        folder = self.folder
        return read_manifest(folder).record if folder is not None else None

    @property
    def normalise(self) -> MeanStd | None:
        if self.weights is not None:
            known = published(Path(self.weights))
            if known is None and isinstance(self.what, str) and in_zoo(self.what):
                return zoo.entry(self.what).normalise()
            return NORMALISATION[known.normalise] if known else None
        record = self.record
        if record is None or record.input.mean is None or record.input.std is None:
            return None
        return record.input.mean, record.input.std

    def open(
        self, shape: tuple[int, ...] | None = None, classes: int | None = None, normalise: MeanStd | None = None
    ) -> nn.Module:
        """The network, in evaluation mode, with its record attached.

        Args:
            shape: (C, H, W) of the data; None: `inputs`, or what the network was made for.
            classes: of the data; a built-in network gets as many outputs.
            normalise: what the data is normalised with, to be kept with the network.

        Raises:
            TersenetError: a network that can't be built or used, of unknown input, or an input that the data has not.
        """
        if self.inputs is not None and shape not in (None, self.inputs.shape):
            raise TersenetError(
                f"the data's samples have shape {shape}, and the example or input shape that was given has "
                f"{self.inputs.shape}: leave it out, or choose other data"
            )
        model, record = self._make(shape or (self.inputs.shape if self.inputs else None), classes)
        if self.weights is not None:
            load_weights(model, self.weights)
        updates: dict[str, Any] = self.inputs.model_dump(include={"shape", "kind", "more"}) if self.inputs else {}
        updates |= {"shape": shape} if shape else {}
        if normalise is not None:
            updates |= {"mean": normalise[0], "std": normalise[1]}
        record = record.model_copy(update={"input": InputSpec.model_validate(record.input.model_dump() | updates)})
        attach(model, record)
        return model.eval()

    @property
    def fingerprint(self) -> str | None:
        """A checksum of the weights that come in, where there are some before we build."""
        if self.weights is not None:
            with open(self.weights, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if isinstance(self.what, nn.Module):
            digest = hashlib.sha256()
            for name, tensor in self.what.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return digest.hexdigest()
        return read_manifest(self.folder).sha256 if self.folder is not None else None

    def pristine(self) -> nn.Module | None:
        """A fresh copy of a user's own network, to replay saved edits on; None for what we can build ourselves."""
        if isinstance(self.what, nn.Module):
            return copied(self.what)
        if self.base is not None:
            return unwrapped(build_custom(self.base))
        return unwrapped(build_custom(self.what)) if self._is_function else None

    @property
    def _is_function(self) -> bool:
        return isinstance(self.what, str) and ":" in self.what and not in_zoo(self.what) and self.folder is None

    def _own_input(self, shape: tuple[int, ...] | None) -> InputSpec:
        if shape is None:
            raise TersenetError(
                f"{self.name} is your own network, and what it takes is not known: give data, example=(x,) or "
                "input_shape=(3, 64, 64); on the command line, --data or --input 3x64x64"
            )
        return InputSpec(shape=shape)

    def _make(self, shape: tuple[int, ...] | None, classes: int | None) -> tuple[nn.Module, Record]:
        known, folder = self.record, self.folder
        if isinstance(self.what, nn.Module):
            return self.what, known or Record(base=None, input=self._own_input(shape))
        if self.arguments and (folder is not None or self._is_function):
            raise TersenetError(
                f"model_arguments ({', '.join(name for name, _ in self.arguments)}) are for models built by name; "
                f"{self.what} is what it is. Leave them out"
            )
        if folder is not None and known is not None:
            return load(folder, unwrapped(build_custom(self.base)) if self.base is not None else None), known
        if self._is_function:
            return unwrapped(build_custom(self.what)), Record(base=self.what, input=self._own_input(shape))
        arguments = dict(self.arguments)
        if in_zoo(self.what):
            one = zoo.entry(self.what)
            arguments = one.fitted(shape, classes, trained=self.weights is not None) | arguments
            model = one.build(**arguments)
            spec = InputSpec(shape=shape or one.shape(model) or DEFAULT_SHAPE)
            return model, Record(base=self.what, arguments=arguments, input=spec)
        found = entry(self.what)
        if classes is not None and classes != found.classes:
            arguments.setdefault("classes", classes)
        if shape is not None and shape[0] != found.input_shape[0]:
            arguments.setdefault("in_channels", shape[0])
        own = (arguments.get("in_channels", found.input_shape[0]), *found.input_shape[1:])
        record = Record(base=self.what, arguments=arguments, input=InputSpec(shape=shape or own))
        return build(self.what, **arguments), record


def example_of(model: nn.Module, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """Zeros in the shapes of the network's inputs, on its device."""
    record = record_of(model)
    if record is None:
        raise TersenetError(f"{type(model).__name__} has no record of its input; pass an example")
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    return record.input.zeros(batch, tensor)
