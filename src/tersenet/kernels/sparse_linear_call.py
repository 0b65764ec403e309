"""One call of a linear layer with a pruned weight: what is left of the weight, how it is cut, threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.kernels import threads
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.host import host
from tersenet.kernels.memory import settled
from tersenet.kernels.sparse_linear import SparseLinear
from tersenet.kernels.winograd import BITS, Call, Tables

KEPT = ("sparse", "scattered")
_UNITS_PER_THREAD = 4  # so that no thread waits long for the last one
_THREAD_FLOATS = 2**16  # less than about 10 microseconds of reading is not worth waking a thread


@dataclass(frozen=True)
class PackedLinear:
    """What is left of a weight, in the tables of `sparse_linear`: `weight` (entries, width), `list` (entries,) or
    (entries, width), `starts` (vectors + 1, and of single weights the places of all lanes), `bias` (vectors width,)."""

    algorithm: SparseLinear
    tables: Tables
    in_features: int
    out_features: int

    @property
    def vectors(self) -> int:
        return -(-self.out_features // self.algorithm.isa.width)

    def dense(self) -> Tensor:
        """The weight (out, in) that was packed."""
        weight, _, inputs, starts = self.tables
        assert weight is not None
        assert inputs is not None
        assert starts is not None
        width, count = self.algorithm.isa.width, self.vectors
        places = inputs.long() & (2**self.algorithm.index - 1)
        owner = torch.repeat_interleave(torch.arange(count), starts[: count + 1].diff())
        lanes = owner[:, None] * width + torch.arange(width)
        if self.algorithm.kept == "scattered":
            lanes = starts[count + 1 :][lanes]
        else:
            places = places[:, None].expand_as(lanes)
        found = torch.zeros(count * width, self.in_features)
        found.index_put_((lanes, places), weight, accumulate=True)  # padding adds zeros
        return found[: self.out_features]


def pack_linear(weight: Tensor, bias: Tensor | None, kept: str, isa: str | None = None) -> PackedLinear:
    """Pack the weight (out, in) of a linear layer, and its bias (out,): only what is not zero.

    Args:
        kept: "sparse": blocks of one input by a vector of outputs, which are kept whole; "scattered": single weights.
        isa: A set of vector instructions that this processor has; the best by default.

    Raises: TersenetError for another shape, type or device, an unknown `kept`, or an `isa` that this processor can't
        run.
    """
    if kept not in KEPT:
        raise UnknownNameError("kept", kept, KEPT)
    if weight.ndim != 2 or 0 in weight.shape or weight.dtype != torch.float32:
        raise TersenetError(f"weight (={weight.dtype} {tuple(weight.shape)}) must be float32 and of shape (out, in)")
    if weight.device.type != "cpu":
        raise TersenetError(f"weight is on {weight.device}; the CPU kernels take CPU tensors")
    outputs, inputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise TersenetError(f"bias (={tuple(bias.shape)}) must have one value for each of {outputs} outputs")
    algorithm = algorithm_of(inputs, kept, isa)
    width, weight = algorithm.isa.width, weight.detach()
    order = torch.arange(outputs)
    if kept == "sparse":
        made = [_blocks(part, width) for part in weight.split(width)]
    else:
        order = weight.count_nonzero(1).argsort(descending=True, stable=True)
        made = [_lanes(weight[lanes], width) for lanes in order.split(width)]
    values, places = (torch.cat(tables) for tables in zip(*made, strict=True))
    starts = torch.tensor([0, *(len(table) for table, _ in made)]).cumsum(0)
    added, lanes = torch.zeros(len(made) * width), torch.arange(len(made) * width)
    lanes[:outputs] = order
    if bias is not None:
        added[:outputs] = bias.detach()[order]
    if kept == "scattered":
        starts = torch.cat((starts, lanes))
    short = places.to(torch.int16 if algorithm.index == 16 else torch.int32)  # keeps the low bits
    return PackedLinear(algorithm, Tables(settled(values), added, settled(short), starts), inputs, outputs)


def algorithm_of(inputs: int, kept: str, isa: str | None = None) -> SparseLinear:
    """The code for so many inputs. Raises: TersenetError where there are no kernels."""
    return SparseLinear(host().isa(isa), kept, 16 if inputs <= 2**16 else 32)


def _blocks(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Values (entries, width) and inputs (entries,) of up to `width` outputs."""
    inputs = (weight != 0).any(0).nonzero()[:, 0]
    values = torch.zeros(len(inputs), width)
    values[:, : len(weight)] = weight[:, inputs].t()
    return values, inputs


def _lanes(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Values and inputs (entries, width), both 0 behind the last weight of a lane."""
    lane, inputs = weight.nonzero().unbind(1)
    counts = lane.bincount(minlength=width)
    entry = torch.arange(len(lane)) - (counts.cumsum(0) - counts)[lane]
    shape = (int(counts.max()), width)
    values, places = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    values[entry, lane], places[entry, lane] = weight[lane, inputs], inputs
    return values, places


@functools.lru_cache(maxsize=1024)
def linear_call(
    algorithm: SparseLinear, rows: int, x_row: int, outputs: int, floats: int, activation: str, count: int
) -> Call:
    """For `rows` rows of x that lie `x_row` floats apart, a weight of so many `floats` and `count` threads. Nothing is
    checked."""
    shape = (rows, outputs, 1, 1)
    if not rows:
        return Call(shape, b"", (), 1, 0, 0)
    vectors = -(-outputs // algorithm.isa.width)
    count = min(count, vectors, max(1, floats // _THREAD_FLOATS))
    step = max(1, vectors // (_UNITS_PER_THREAD * count)) if count > 1 else vectors
    low, high = BITS[activation]
    fields = {
        "x_row": x_row, "y_row": outputs, "tiles": rows, "outputs": vectors, "output_step": step,
        "out_channels": outputs, "low": low, "high": high,
    }  # fmt: skip
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    return Call(shape, bytes(context), tuple(kernels(algorithm).tasks.values()), count, 0, 0)


def sparse_linear(x: Tensor, packed: PackedLinear, activation: str = "none") -> Tensor:
    """activation(x W^T + b) for x (N, in), float32, each row in one piece, on the CPU: (N, out). Nothing is checked."""
    weight = packed.tables.weight
    assert weight is not None
    settings = (packed.out_features, weight.numel(), activation, threads.available())
    call = linear_call(packed.algorithm, len(x), x.stride(0), *settings)
    return call.run(x, packed.tables, None, torch.empty(len(x), packed.out_features))
