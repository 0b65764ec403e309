"""Data-parallel training under torchrun; without it every function here is the one-process case.

The pipeline opens `process_group` once, around everything. Each rank trains on its own share of a batch, gradients are
averaged, batch norm's statistics are those of rank 0, and only rank 0 writes and logs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tersenet.errors import TersenetError

_T = TypeVar("_T")


def rank() -> int:
    return dist.get_rank() if _running() else 0


def world() -> int:
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device: torch.device | str) -> Generator[torch.device]:
    """Joins the processes that torchrun started (gloo on a CPU, nccl on CUDA); yields this rank's device.

    Without torchrun, or inside a process group that is there already, it yields `device` and does nothing.
    """
    device = torch.device(device)
    if _running() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, or the wrapper that averages its gradients over ranks and gives all of them rank 0's buffers.

    Wrap anew for each epoch: after its first step the wrapper sorts its gradient buckets again, so sums over more than
    two ranks would round differently in a resumed run.
    """
    if world() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """`values` summed over ranks, by way of `device`."""
    if world() == 1:
        return values
    total = values.to(device)
    dist.all_reduce(total)
    return total.to(values.device)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the tensors of rank 0, in place. Tensors on the CPU go by way of the GPU where it has to be."""
    if world() == 1:
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
            moved = tensor.cuda()
            dist.broadcast(moved, 0)
            tensor.copy_(moved)
        else:
            dist.broadcast(tensor, 0)


def from_first(action: Callable[[], _T]) -> _T:
    """What `action` gives on the first rank, on every rank. What it refuses is refused on all, so that none waits."""
    if world() == 1:
        return action()
    outcome: list[Any] = [None, None]  # the result, the refusal
    if is_main():
        try:
            outcome[0] = action()
        except TersenetError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise TersenetError(outcome[1])
    return outcome[0]


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
