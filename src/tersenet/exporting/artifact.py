"""A network in a folder: `model.json` (base, arguments, edits) and `model.safetensors`. Never a pickle.

Weights that are mostly zero behind a mask are kept without their zeros.

Loading builds the base on `meta`, replays the edits and assigns the tensors. A file from a stranger can fail with a
clear error; it can't run code, allocate memory by a forged shape, or reach outside its folder.

Saving over an older artifact: the new tensors are written beside the old, then `model.json` (which holds their
checksum) is replaced, then the tensors. Killed at any point, the folder loads as the old or the new network.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tersenet import atomic
from tersenet.errors import ArtifactError, TersenetError
from tersenet.exporting.compact_weights import packed, unpacked
from tersenet.graph.edits import Budget
from tersenet.graph.record import Record, attach, record_of
from tersenet.models.registry import in_zoo

JSON_NAME = "model.json"
TENSORS_NAME = "model.safetensors"
_NEW_NAME = "model.safetensors.new"
FILES = (JSON_NAME, TENSORS_NAME, _NEW_NAME)
_MAX_JSON_BYTES = 64 * 2**20
# What a network may compute with, and its tensors be kept in, whatever it was built with.
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The content of `model.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["tersenet-model"] = "tersenet-model"
    version: Literal[1] = 1
    record: Record
    tensors: Literal["model.safetensors"] = TENSORS_NAME
    sha256: Digest
    """of the tensors' file"""
    record_sha256: Digest | None = None
    """of `record` as compact JSON with sorted keys: a flipped bit in an index would be another network"""
    normalise_note: Literal["(x / 255 - mean) / std"] = "(x / 255 - mean) / std"


def save(model: nn.Module, folder: Path | str) -> Path:
    """Write `model` with its edits into `folder`; returns the folder.

    Raises:
        TersenetError: a network that tersenet did not build, load or trace; a full disk. An older artifact in the
            folder still loads then.
    """
    folder = Path(folder)
    record = record_of(model)
    if record is None:
        raise TersenetError(
            f"{type(model).__name__} has no record of how it was built: pass it through tersenet.compress or "
            "tersenet.load first, or build it with tersenet"
        )
    if (folder.exists() and not folder.is_dir()) or folder.is_symlink():
        raise TersenetError(f"{folder} is not a folder; choose another place for the model")
    new = folder / _NEW_NAME
    if _matches(folder / JSON_NAME, new):
        # An earlier call was killed between its two replacements: what loads now must not be overwritten.
        _move(new, folder / TENSORS_NAME)
    # Clones, since the format refuses tensors that share memory. By way of bytes, since the library's own file would
    # be readable by its owner alone, and a full disk an error of its own kind.
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in _own(model)}
    data = to_bytes(packed(model, tensors), metadata={"format": "pt"})
    manifest = Manifest(record=record, sha256=hashlib.sha256(data).hexdigest(), record_sha256=_digest(record))
    try:
        atomic.write_bytes(new, data)
        atomic.write_text(folder / JSON_NAME, manifest.model_dump_json(indent=1) + "\n")
        _move(new, folder / TENSORS_NAME)
    finally:
        if not _matches(folder / JSON_NAME, new):
            new.unlink(missing_ok=True)
    return folder


def load(folder: Path | str, base: nn.Module | None = None) -> nn.Module:
    """The network in `folder`, in evaluation mode, on the CPU.

    Args:
        base: for a network that started as a user's own module: a fresh instance of it; its structure is changed in
            place and its weights are replaced.

    Raises:
        ArtifactError: not an artifact, damaged, forged, or of a newer format.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = _tensor_file(folder, manifest)
    try:
        model = _skeleton(manifest.record, base, folder)
        # Copies lie where torch aligns them. In the mapped file they do not, and kernels then round differently.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        tensors = unpacked(model, tensors, str(path))
        _assign(model, tensors, path)
    except ArtifactError:
        raise
    except TersenetError as error:
        raise ArtifactError(f"{folder / JSON_NAME}: {error}") from error
    # RuntimeError: what torch makes of a size that fits nothing.
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} can't be read: {str(error).partition(chr(10))[0]}") from error
    attach(model, manifest.record)
    return model.eval()


def read_manifest(folder: Path) -> Manifest:
    """`model.json`, checked. Raises: ArtifactError."""
    path = folder / JSON_NAME
    if not path.is_file():
        hint = " It holds a pickle, which could run code and is not read" if _holds_pickle(folder) else ""
        raise ArtifactError(f"{folder} is not a saved model: it has no {JSON_NAME}.{hint}")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ArtifactError(f"{path} is {path.stat().st_size:,} bytes; a real one is far below {_MAX_JSON_BYTES:,}")
    try:
        data = path.read_bytes()
        raw = json.loads(data)
        version = raw.get("version", 1) if isinstance(raw, dict) else 1
        if version != 1:
            raise ArtifactError(f"{path} has format version {version}; this tersenet reads 1. Update tersenet")
        manifest = Manifest.model_validate_json(data, context=Budget())
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {str(e['input'])[:60]!r})"
            for e in error.errors(include_url=False)[:5]
        )
        raise ArtifactError(f"{path} is damaged or was not written by tersenet: {problems}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error
    if manifest.record_sha256 not in (None, _canonical_digest(raw["record"])):
        raise ArtifactError(f"{path} is damaged: its checksum is not that of its content. Copy the folder again")
    return manifest


def _skeleton(record: Record, base: nn.Module | None, folder: Path) -> nn.Module:
    """The network's structure: a base that we can build, without weights, or the user's, with the edits replayed."""
    if record.base is None or (":" in record.base and not in_zoo(record.base)):
        if base is None:
            named = f" {record.base}, which only you can vouch for" if record.base else ""
            raise ArtifactError(
                f"{folder} was made from your own module{named}: pass a fresh one, tersenet.load(folder, base=Net()), "
                "or on the command line --base package.module:function"
            )
        model = base
        done = _edits_of(base, record, folder)
    else:
        from tersenet.models.build import build_skeleton

        model = build_skeleton(record.base, **record.arguments)
        done = 0
    for edit in record.edits[done:]:
        edit.replay(model)
    return model


def _edits_of(base: nn.Module, record: Record, folder: Path) -> int:
    """How many of the edits `base` has had already: it may be what a compression started from."""
    known = record_of(base)
    edits = known.edits if known else ()
    if record.edits[: len(edits)] != edits:
        raise ArtifactError(f"{folder}: this {type(base).__name__} has been changed in another way; pass a fresh one")
    return len(edits)


def _assign(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Strictly: the same names, shapes and kinds of number, nothing missing, what was shared shared again."""
    expected = dict(_own(model))
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unexpected" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        value, wanted = tensors[name], expected[name]
        if value.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(value.shape)} in place of {tuple(wanted.shape)}")
        elif value.dtype != wanted.dtype and not {value.dtype, wanted.dtype} <= {*_FLOATS}:
            problems.append(f"{name} is {value.dtype} in place of {wanted.dtype}")
    if problems:
        raise ArtifactError(f"{path} does not fit its {JSON_NAME}: " + "; ".join(sorted(problems)[:5]))
    own = model.state_dict(keep_vars=True)
    filled: dict[int, Tensor] = {}
    for name, old in own.items():
        if id(old) not in filled:
            filled[id(old)] = nn.Parameter(tensors[name]) if isinstance(old, nn.Parameter) else tensors[name]
    model.load_state_dict({name: filled[id(old)] for name, old in own.items()}, assign=True)


def _own(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The state dict's items, every shared tensor once, under its first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first.setdefault(id(value), (name, value))
    return list(first.values())


def _tensor_file(folder: Path, manifest: Manifest) -> Path:
    """The file with the checksum of `model.json`; `.new` if saving was interrupted between the two replacements."""
    candidates = [folder / TENSORS_NAME, folder / _NEW_NAME]
    for path in candidates:
        if path.is_file() and _sha256(path) == manifest.sha256:
            return path
    if not candidates[0].is_file():
        raise ArtifactError(f"{folder} has no {TENSORS_NAME}; copy it from where the model was saved")
    raise ArtifactError(
        f"{candidates[0]} is damaged: its checksum is not the one in {JSON_NAME}. Copy the folder again"
    )


def _matches(manifest: Path, tensors: Path) -> bool:
    try:
        return Manifest.model_validate_json(manifest.read_bytes()).sha256 == _sha256(tensors)
    except (OSError, ValueError):
        return False


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise atomic.unwritten(target, error) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Record) -> str:
    return _canonical_digest(record.model_dump(mode="json"))


def _canonical_digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _holds_pickle(folder: Path) -> bool:
    return folder.is_dir() and any(p.suffix in {".pt", ".pth", ".pkl", ".bin", ".th"} for p in folder.iterdir())


def is_artifact(path: Any) -> bool:
    """Whether `path` names a saved folder."""
    return (Path(path) / JSON_NAME).is_file()
