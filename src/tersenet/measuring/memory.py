"""The memory that one forward needs, without running it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tersenet.measuring.macs import bytes_of
from tersenet.measuring.meta import meta_copy, meta_example, run_on_meta, tensors_in


def peak_memory(model: nn.Module, example: Any) -> int:
    """Bytes: parameters and buffers, plus the most that inputs and activations hold at one time in a forward without
    gradients.

    Every storage counts from the operator that made it until Python lets go of it, so a skip connection costs what it
    keeps alive and in-place operators cost nothing. What a kernel allocates inside itself (a workspace) is not seen.

    Raises: TersenetError if the network needs the values of its tensors, or does not take this example.
    """
    copied = meta_copy(model)
    inputs = meta_example(example)
    with LiveStorages(copied, inputs) as live:
        run_on_meta(copied, inputs)
    return bytes_of(model) + live.peak


class LiveStorages(TorchDispatchMode):
    """While active, `peak` is the largest sum of bytes of the storages alive: those of `inputs` and all made since."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.peak = 0
        self._weights = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
        # torch keeps one Python object per storage until its memory is freed: the entry goes when the memory does.
        self._live: WeakKeyDictionary[UntypedStorage, int] = WeakKeyDictionary()
        self._see(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # On `meta` this operator also makes the batch statistics, which real kernels leave empty in eval mode.
        self._see(out[0] if func is torch.ops.aten.native_batch_norm.default else out)
        return out

    def _see(self, value: Any) -> None:
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            if storage not in self._weights:
                self._live[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
