"""Reading weight files of others, without running anything that is in them."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tersenet.errors import ArtifactError, TersenetError
from tersenet.models.registry import PUBLISHED, Published

# Under these keys training scripts keep the state dict beside epoch, optimizer and so on.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
# DataParallel, DistributedDataParallel; torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
# Heads that only training uses (GoogLeNet, Inception, FCN, DeepLab). torchvision's files have them, and a network that
# was built without them does not need them.
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.", "aux_classifier.")
# How torch's unpickler names what it refuses to look up.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or a torch checkpoint (`.pt`, `.pth`, `.th`, `.pt.tar` ...), on the CPU.

    Looks into a checkpoint's `state_dict`, `model` or the like, and takes the `module.` of DataParallel off the names.

    Raises:
        TersenetError: no file there.
        ArtifactError: damaged or truncated, not a state dict, or a pickle that needs more than tensors: nothing of it
            has been run.
    """
    path = Path(path)
    if not path.is_file():
        raise TersenetError(f"no weight file at {path}" + (": it is a folder" if path.is_dir() else ""))
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _tensors(_unwrapped(content), path)
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        _refuse_compressed(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found is None:
            raise _damaged(path) from error
        raise ArtifactError(
            f"{path} holds more than tensors: reading it would run {found[1]}, so nothing of it was read. "
            "If you trust where it comes from, save its state dict alone with torch.save or safetensors, and take that."
        ) from error
    except Exception as error:  # a damaged file raises nearly anything: EOFError, KeyError, struct.error, RuntimeError
        raise _damaged(path, error) from error


def _refuse_compressed(path: Path) -> None:
    """torch.save never compresses: a small file that grows without limit when it is read is an attack."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if compressed:
        raise ArtifactError(f"{path} is a compressed archive, not a file that torch.save wrote")


def _damaged(path: Path, error: Exception | None = None) -> ArtifactError:
    reason = "" if error is None else f": {str(error).partition('. ')[0] or type(error).__name__}"
    return ArtifactError(f"{path} is damaged, cut off ({path.stat().st_size:,} bytes) or not a weight file{reason}")


def _unwrapped(content: Any) -> Any:
    for _ in range(2):  # not `while`: a forged dictionary may hold itself
        if isinstance(content, Mapping):
            content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    return content


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """`content` if it is a state dict that can be copied from: real numbers, dense, held in the file."""
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if content == {} else f"a {type(content).__name__}"
        raise ArtifactError(f"{path} holds {what}, not a state dict (names with their tensors)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArtifactError(
                f"{path} holds no state dict: {name!r} is a {type(value).__name__}, not a tensor. "
                f"A state dict may also lie under one of the keys {', '.join(_WRAPPERS)}."
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            raise ArtifactError(
                f"{path}: {name} must be a dense tensor of real numbers, "
                f"not {value.layout} {value.dtype} on device {value.device}"
            )
    return cast(dict[str, Tensor], dict(content))


def load_weights(model: nn.Module, path: str | PathLike[str]) -> Published | None:
    """Copy the weights of a file into `model`, and say whether it is a published file of known accuracy.

    Names and shapes must be equal; only the batch counters of batch norm may be missing, which files from before
    PyTorch 0.4.1 do not have.

    Raises:
        TersenetError: another architecture's weights, or a model on `meta`; `model` is unchanged.
        ArtifactError: as `read_state_dict`.
    """
    path = Path(path)
    state = read_state_dict(path)
    known_file = published(path)
    own = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(_AUXILIARY)}
    if any(tensor.is_meta for tensor in own.values()):
        raise TersenetError(f"this {type(model).__name__} is on the meta device and has no memory for {path}")
    differences = _differences(own, state)
    if differences:
        known = f" It is known: the published weights of {known_file.model}." if known_file else ""
        raise TersenetError(
            f"the weights in {path} are not those of this {type(model).__name__}, which is unchanged: "
            f"{'; '.join(differences)}.{known} Choose the model, classes and width that they were trained with."
        )
    model.load_state_dict(state, strict=False)
    return known_file


def published(path: Path) -> Published | None:
    """The entry of a published file, recognised by its checksum. Raises: ArtifactError if there is no such file."""
    if not path.is_file():
        raise ArtifactError(f"there is no weights file {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return next((known for known in PUBLISHED if known.sha256 == digest), None)


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in own if key not in given and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    shapes = [
        f"{key} is {tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in given and own[key].shape != given[key].shape
    ]
    kinds = (("missing in the file", missing), ("unknown to the model", unexpected), ("of another shape", shapes))
    return [_sample(kind, found) for kind, found in kinds if found]


def _sample(kind: str, found: list[str], most: int = 5) -> str:
    more = ", ..." if len(found) > most else ""
    return f"{len(found)} {kind}: {', '.join(found[:most])}{more}"
