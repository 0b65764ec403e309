"""Which ReLU stands before a convolution alone, so that it can move into it; and a proof that it was that one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.edits_sparse import MovedReLU, WinogradDomain
from tersenet.graph.example import random_like
from tersenet.graph.model import ModelGraph
from tersenet.graph.precision import full_float32
from tersenet.graph.trace import Op, Ref, Trace, evaluating, refs_in, tensors_in
from tersenet.nn.skip_relu import SkipsReLU
from tersenet.nn.winograd_relu import WinogradReLUConv2d

_POOLS = frozenset(["max_pool2d_with_indices", "max_pool2d", "adaptive_max_pool2d"])
"""What gives the same before a ReLU as behind it."""
_SAME_OUTPUTS = 1e-3


def movable_relus(graph: ModelGraph, layers: Sequence[str]) -> tuple[dict[str, MovedReLU], dict[str, str]]:
    """Of these convolutions: the ReLU that each can take over, and the reasons of those that can take none.

    A ReLU can move if all that read it are among `layers`, directly or behind max pools.
    """
    search = _Search(graph, layers)
    found: dict[str, Op] = {}
    left: dict[str, str] = {}
    for name in layers:
        relu = search.relu_of(name)
        if isinstance(relu, str):
            left[name] = relu
        else:
            found[name] = relu
    owners: dict[int, str | None] = {}
    for name, relu in list(found.items()):
        owner = search.owner(relu)
        if isinstance(owner, str):
            left[name] = owner
            del found[name]
        else:
            owners[relu.number] = owner[0]
    return {name: search.moved(found[name], owners) for name in found}, left


class _Search:
    def __init__(self, graph: ModelGraph, layers: Sequence[str]) -> None:
        self.trace: Trace = graph.trace
        self.outputs = set(refs_in(self.trace.outputs))
        self.modules = dict(graph.model.named_modules())
        self.aliases: dict[int, list[str]] = {}
        for path, module in graph.model.named_modules(remove_duplicate=False):
            self.aliases.setdefault(id(module), []).append(path)
        self.skipping = [path for path, module in self.modules.items() if isinstance(module, SkipsReLU)]
        self.runs: dict[str, list[Op]] = {name: [] for name in layers}
        self.writers: dict[Ref, list[Op]] = {}
        for op in self.trace.ops:
            for ref in dict.fromkeys(refs_in(op.result)):
                self.writers.setdefault(ref, []).append(op)
            if op.name == "convolution" and op.place.module in self.runs:
                self.runs[op.place.module].append(op)
        self.readers_of = {ops[0].number: name for name, ops in self.runs.items() if len(ops) == 1}

    def relu_of(self, name: str) -> Op | str:
        """The ReLU that this convolution reads and may take over, or why there is none."""
        ops = self.runs[name]
        if len(ops) != 1:
            return f"it runs {len(ops)} times in a pass"
        ref, number = ops[0].args[0], ops[0].number
        while True:
            writer = next((op for op in reversed(self.writers.get(ref, [])) if op.number < number), None)
            if writer is None:
                return "it reads the network's input"
            if writer.name == "relu":
                return self._reason(writer) or writer
            if writer.name not in _POOLS:
                return f"there is no ReLU before it, but {writer.name.removeprefix('_')}"
            ref, number = writer.args[0], writer.number

    def _reason(self, relu: Op) -> str | None:
        """Why a ReLU can't move: somebody else reads it."""
        waiting: list[tuple[Ref, int]] = [(refs_in(relu.result)[0], relu.number)]
        while waiting:
            ref, since = waiting.pop()
            later = [op.number for op in self.writers.get(ref, []) if op.number > since]
            until = min(later, default=len(self.trace.ops))
            if not later and ref in self.outputs:
                return "its ReLU is an output of the network"
            for op in self.trace.readers.get(ref, []):
                if not since < op.number <= until:
                    continue
                first = bool(op.args) and op.args[0] == ref and refs_in([op.args[1:], op.kwargs]).count(ref) == 0
                if first and op.name in _POOLS:
                    values, *places = refs_in(op.result)
                    if any(self.trace.readers.get(place) for place in places):
                        return f"its ReLU is read by a pool whose places are used, {op.place.module}"
                    waiting.append((values, op.number))
                elif not (first and op.number in self.readers_of):
                    reader = op.place.module or "the network's own forward"
                    return f"its ReLU is read by {reader} too ({op.name.removeprefix('_')})"
        return None

    def owner(self, relu: Op) -> tuple[str | None] | str:
        """(path,) of the module whose forward calls it; (None,) if it is a module of its own. Or why it can't move."""
        path = relu.place.module
        earlier = next((p for p in self.skipping if path == p or path.startswith(f"{p}." if p else "")), None)
        if earlier is not None:
            return f"its ReLU is in {earlier or 'the forward'}, from which an earlier step has moved others"
        module = self.modules[path]
        if type(module) is not nn.ReLU:
            return (path,)
        if sum(op.name == "relu" and op.place.module == path for op in self.trace.ops) == 1:
            return (None,)
        if len(self.aliases[id(module)]) > 1:
            return f"its ReLU is one module under several names ({', '.join(self.aliases[id(module)][:3])})"
        return (path.rpartition(".")[0],)

    def moved(self, relu: Op, owners: Mapping[int, str | None]) -> MovedReLU:
        """`owners`: of every ReLU that moves, by its operator's number."""
        owner = owners[relu.number]
        if owner is None:
            return MovedReLU(owner=relu.place.module)
        all_owners = {path for path in owners.values() if path is not None} | set(self.skipping)
        call = 0
        for op in self.trace.ops[: relu.number]:
            own_module = op.number in owners and owners[op.number] is None
            if op.name == "relu" and not own_module and self._innermost(op, all_owners) == owner:
                call += 1
        return MovedReLU(owner=owner, call=call)

    def _innermost(self, op: Op, owners: set[str]) -> str | None:
        path = op.place.module
        around = [p for p in owners if not p or path == p or path.startswith(f"{p}.")]
        return max(around, key=len, default=None)


def check_moved(graph: ModelGraph, edits: Sequence[WinogradDomain]) -> list[str]:
    """The layers whose edits do something else than moving a ReLU. Usually none.

    Each layer can compute as the ReLU and convolution that it takes the place of; so the network must give what it
    gave, before the ReLU is moved for good.

    Raises: GraphError if the edits do so together only.
    """
    if not edits or _same_outputs(graph, edits):
        return []
    owners = {edit.relu.owner if edit.relu else "" for edit in edits}
    groups = [[edit for edit in edits if (edit.relu.owner if edit.relu else "") == owner] for owner in sorted(owners)]
    wrong = [edit.module for group in groups if not _same_outputs(graph, group) for edit in group]
    if not wrong:
        raise GraphError(
            "after the ReLUs were moved the network computes something else: its forward takes other paths than when "
            "it was traced. Leave layers out with `exclude`"
        )
    return wrong


def _same_outputs(graph: ModelGraph, edits: Sequence[WinogradDomain]) -> bool:
    inputs = random_like(graph.example, seed=0)
    own = graph.copy(shared=[*graph.model.parameters(), *graph.model.buffers()])
    before = _outputs(own.model, inputs)
    for edit in edits:
        edit.replay(own.model)
    for edit in edits:
        layer = own.model.get_submodule(edit.module)
        assert isinstance(layer, WinogradReLUConv2d)
        layer.spatial_share = 1.0
    after = _outputs(own.model, inputs)
    return all(_near(a, b) for a, b in zip(before, after, strict=True))


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    # Not as it is traced: there such layers are run as any convolution.
    with evaluating(model), torch.no_grad(), full_float32():
        # A copy: a network may write into what it is given.
        return [x.double() for x in tensors_in(model(*copy.deepcopy(inputs))) if x.is_floating_point()]


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    scale = a.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return bool((a - b).abs().max() <= _SAME_OUTPUTS * scale)
