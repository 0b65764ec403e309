"""What `lower` did to each layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LoweredLayer:
    """One convolution with what was fused into it.

    `choice`: `torch`, `direct` (oneDNN, packed) or a Winograd algorithm. `times`: choice -> median milliseconds, empty
    where the choice was forced. `error`: relative L2 distance from torch's convolution of the same input and folded
    weight. `rejected`: faster choices whose error was too large.
    """

    name: str
    kind: str
    input: tuple[int, ...]
    choice: str
    times: dict[str, float]
    error: float
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoweredReport:
    """`error`: the largest relative L2 distance of an output from the original network's. `folded`: batch norms, scales
    and shifts that are now part of a weight. `other`: operator -> how often it is left as it was. `batch` and `threads`
    are those of the measurement."""

    layers: tuple[LoweredLayer, ...]
    error: float
    folded: int
    other: dict[str, int]
    batch: int
    threads: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("LAYER", "CONVOLUTION", "INPUT", "KERNEL", "MS", "DIRECT MS", "ERROR")
        rows = [head, *map(_row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        other = ", ".join(f"{count} {name}" for name, count in sorted(self.other.items())) or "nothing"
        lines += [
            "",
            f"relative error of the outputs  {self.error:.1e}",
            f"folded into weights            {self.folded} batch norms, scales and shifts",
            f"left as it was                 {other}",
            f"measured with                  batch {self.batch}, {self.threads} thread(s)",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _row(layer: LoweredLayer) -> tuple[str, ...]:
    own, direct = layer.times.get(layer.choice), layer.times.get("direct")
    times = ("" if own is None else f"{own:.3f}", "" if direct is None else f"{direct:.3f}")
    choice = layer.choice + "".join(f" (not {name}: error)" for name in layer.rejected)
    return (layer.name, layer.kind, "x".join(map(str, layer.input)), choice, *times, f"{layer.error:.1e}")
