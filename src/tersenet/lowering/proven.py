"""Checks that a network has passed on this machine before: they need not be made again.

Which kernel is exact enough for each layer, and whether the lowered network is right, is found out by passes of both
networks on noise that is always the same. What decides about the outcome is the network with every number in it, the
noise, the machine, torch and the code of this package: the outcome is kept on disk under a digest of all that.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersenet.kernels import cache
from tersenet.lowering.assign import Judged, channels_last
from tersenet.lowering.choose import described
from tersenet.lowering.layers import AnyLayer
from tersenet.lowering.timings import machine_key

_OWN = ("kernels", "lowering", "nn", "ops")
"""Folders of this package whose code decides about results."""
_LARGE, _ROW = 1 << 16, 2048  # numbers


@dataclass(frozen=True)
class Proof:
    """`layers`: the name of a layer's module -> what it got. `error`: the largest of the network's outputs."""

    layers: Mapping[str, Judged]
    error: float


def evidence(model: nn.Module, graph: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[str, str, str]:
    """All that decides about the numbers of `model` and its plain `graph`."""
    digest = hashlib.sha256(graph.code.encode())
    tensors = [*graph.named_parameters(), *graph.named_buffers()]
    tensors += [(f"input {number}", x) for number, x in enumerate(inputs) if isinstance(x, Tensor)]
    for name, tensor in tensors:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.stride())).encode())
        digest.update(_summary(tensor))
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}", digest.hexdigest(), _own_code()


class ProofFile:
    """Where the proof of a network is kept."""

    def __init__(
        self, found: tuple[str, str, str], layers: Mapping[str, AnyLayer], candidates: Mapping[str, list[str]]
    ) -> None:
        """Args: found: the `evidence`. candidates: layer -> choices that it could get, in their order."""
        what = (found, [(target, described(layer), candidates[target]) for target, layer in layers.items()])
        pairs = [(layers[target], name) for target, names in candidates.items() for name in names]
        self._key = machine_key(what, pairs)
        self._name = f"proof-{hashlib.sha256(self._key).hexdigest()[:24]}"
        self._candidates = candidates

    def read(self, limit: float) -> Proof | None:
        """None if there is none, or one of a larger error."""
        data = cache.read(self._name, self._key)
        if data is None:
            return None
        try:
            known = json.loads(data)
            layers = {target: _judged(one, self._candidates[target]) for target, one in known["layers"].items()}
            error = float(known["error"])
        except (ValueError, TypeError, KeyError, AttributeError):  # not what this version writes
            return None
        return Proof(layers, error) if layers.keys() == self._candidates.keys() and 0 <= error <= limit else None

    def write(self, proof: Proof) -> None:
        found = {"layers": {target: asdict(one) for target, one in proof.layers.items()}, "error": proof.error}
        cache.write(self._name, self._key, json.dumps(found).encode())


def _judged(known: dict[str, Any], candidates: list[str]) -> Judged:
    """Raises: ValueError for a choice that a layer can't have."""
    choice, rejected = str(known["choice"]), tuple(map(str, known["rejected"]))
    if choice not in candidates:
        raise ValueError(choice)
    return Judged(choice, float(known["error"]), rejected)


def _summary(tensor: Tensor) -> bytes:
    """A digest of the numbers in the order of memory. Of many it has sums of their bits and products with random
    numbers: sha256 takes ten times as long to read them."""
    last = channels_last(tensor.detach())
    data = (last.permute(0, 2, 3, 1) if last.dim() == 4 else last).reshape(-1)
    if data.dtype != torch.float32 or len(data) < _LARGE:
        return data.contiguous().view(torch.uint8).numpy().tobytes()
    rows = data[: len(data) // _ROW * _ROW].view(-1, _ROW)
    random = torch.randn(_ROW, generator=torch.Generator().manual_seed(0))
    sums = np.add.reduce(rows.numpy().view(np.uint64), axis=1)
    return sums.tobytes() + (rows @ random).numpy().tobytes() + data[rows.numel() :].numpy().tobytes()


@functools.cache
def _own_code() -> str:
    digest = hashlib.sha256()
    for folder in _OWN:
        for path in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
