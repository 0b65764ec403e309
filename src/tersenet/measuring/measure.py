"""Everything that is measured of one network, and the layers of two side by side."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersenet.measuring import latency as timing
from tersenet.measuring.macs import LayerCost, bytes_of, count_macs, params_of
from tersenet.measuring.memory import peak_memory
from tersenet.results import Accuracy, Latency, LayerRow, Measures


def measure(
    model: nn.Module, example: Any, *, accuracy: Accuracy | None = None, latency: bool | Latency = True
) -> Measures:
    """Parameters, MACs, bytes and peak memory of `model` for `example`, with the accuracy and latency handed in.

    `example` is a tensor, a tuple of arguments or a dict of keyword arguments; MACs, memory and time are for all of it,
    so a batch of 1 gives the usual figures. `latency=True` times the network here, False leaves that out.

    To compare networks on the clock, time them together with `compare` and hand each its `Latency`.

    Raises: TersenetError if the network needs the values of its tensors, or does not take this example.
    """
    macs, uncounted = count_macs(model, example)
    timed = timing.latency(model, example) if latency is True else latency or None
    return Measures(
        params=params_of(model),
        macs=macs,
        bytes=bytes_of(model),
        top1=accuracy.top1 if accuracy else None,
        top5=accuracy.top5 if accuracy else None,
        n_eval=accuracy.n if accuracy else None,
        latency_ms=timed.median_ms if timed else None,
        peak_memory_bytes=peak_memory(model, example),
        accuracy=accuracy,
        latency=timed,
        uncounted=uncounted,
    )


def layer_rows(before: dict[str, LayerCost], after: dict[str, LayerCost]) -> list[LayerRow]:
    """Two tables of `layer_table` as rows of a report, in the order of `before`, then what is new in `after`.

    A layer that is in one table only has zeros for the other, and a note that says so.
    """
    return [_row(name, before.get(name), after.get(name)) for name in {**before, **after}]


def _row(name: str, before: LayerCost | None, after: LayerCost | None) -> LayerRow:
    absent = LayerCost("", 0, 0, 0, 0)
    old, new = before or absent, after or absent
    return LayerRow(
        name=name,
        kind=new.kind or old.kind,
        in_before=old.in_channels,
        in_after=new.in_channels,
        out_before=old.out_channels,
        out_after=new.out_channels,
        macs_before=old.macs,
        macs_after=new.macs,
        params_before=old.params,
        params_after=new.params,
        note="new" if before is None else "removed" if after is None else "",
    )
