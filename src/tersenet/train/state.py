"""The checkpoint of a training run: one atomic file, after each epoch, of plain tensors and numbers."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersenet import atomic
from tersenet.errors import ArtifactError, TersenetError
from tersenet.results import Accuracy
from tersenet.train.hooks import Hooks, TrainState

FORMAT = 1
START_AGAIN = (
    "start again in another folder (--out), or with --fresh (in Python fresh=True), which removes the whole run, "
    "finished steps included"
)


@dataclass
class Best:
    """The weights that were best on the validation split so far."""

    epoch: int
    score: list[float]
    weights: dict[str, Tensor]


def better(best: Best | None, epoch: int, accuracy: Accuracy, network: nn.Module) -> Best:
    """`best`, or this epoch if it is better: by the data's own metric, or else by top-1, and then by the loss."""
    first = accuracy.metric if accuracy.metric is not None else accuracy.top1
    score = [value for value in (first, None if accuracy.loss is None else -accuracy.loss) if value is not None]
    if best is not None and score <= best.score:
        return best
    return Best(epoch, score, {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()})


@dataclass
class Checkpoint:
    """Everything that a run needs to go on, and the file that holds it (None: nothing is written).

    Random state is not in it: each epoch starts from a seed of its own.
    """

    path: Path | None
    seed: int
    state: TrainState
    hooks: Hooks
    scaler: torch.amp.GradScaler
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None

    def save(self) -> None:
        """Writes the file whole, or leaves it as it was.

        Raises:
            TersenetError: the disk is full, or a hook gave a value that could not be read back.
        """
        if self.path is None:
            return
        ema = self.state.ema
        content = {
            **self._identity(),
            "step": self.state.step,
            "model": self.state.model.state_dict(),
            "ema": ema.state_dict() if ema is not None else None,
            "optimizer": self.state.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "hooks": self.hooks.state_dict(),
            "rows": self.rows,
            "best": vars(self.best) if self.best is not None else None,
        }
        for name in ("hooks", "rows"):
            _require_plain(content[name], name)
        # By way of memory, since torch.save reports a full disk as an error of its own kind.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with atomic.replace(self.path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def restore(self) -> bool:
        """Takes up the state of the file, if there is one.

        Raises:
            ArtifactError: the file is damaged or not a checkpoint.
            TersenetError: it belongs to another run. Nothing has been changed in either case.
        """
        if self.path is None or not self.path.exists():
            return False
        content = _read(self.path)
        self._check_identity(self.path, content)
        self.state.model.load_state_dict(content["model"])
        if self.state.ema is not None:
            self.state.ema.load_state_dict(content["ema"])
        self.state.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.hooks.load_state_dict(content["hooks"])
        self.state.step = content["step"]
        self.rows = content["rows"]
        self.best = Best(**content["best"]) if content["best"] is not None else None
        return True

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on where another stopped."""
        settings = self.state.fit.model_dump(mode="json")
        return {"format": FORMAT, "fit": settings, "seed": self.seed, "network": _shape_digest(self.state.model)}

    def _check_identity(self, path: Path, content: dict[str, Any]) -> None:
        for key, now in self._identity().items():
            then = content.get(key)
            if then == now:
                continue
            if key == "fit" and isinstance(then, dict):
                names = [name for name in now if cast("dict[str, Any]", then).get(name) != now[name]]
                what = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in names)
            else:
                what = "the network has other layers" if key == "network" else f"{key} was {then!r}, is {now!r}"
            raise TersenetError(
                f"the checkpoint {path} is of another run ({what}): go back to what it was, or {START_AGAIN}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        # torch.load does not check the archive's checksums: a flipped bit would just be another weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("it holds something else")
    # Damaged archives and pickles make torch raise about anything.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(
            f"the checkpoint {path} can't be read ({reason}): it is damaged, or not one of tersenet's. Delete it to "
            f"train this step from its start, or {START_AGAIN}."
        ) from error
    return cast("dict[str, Any]", content)


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, (dict, list, tuple)):
        parts = (
            cast("dict[Any, Any]", value).items() if isinstance(value, dict) else enumerate(cast("list[Any]", value))
        )
        for key, part in parts:
            _require_plain(part, f"{where}[{key!r}]")
    # By exact type: numpy's numbers are floats too, but can't be read back safely.
    elif value is not None and not isinstance(value, Tensor) and type(value) not in (bool, int, float, str):
        raise TersenetError(
            f"can't save {where}, a {type(value).__name__}: hooks may give plain numbers, strings and tensors, and "
            "lists and dicts of them"
        )


def _shape_digest(model: nn.Module) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
