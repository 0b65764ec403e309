"""What `lower` did to each layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tersenet.lowering.layers import WINOGRAD


@dataclass(frozen=True)
class LoweredLayer:
    """One convolution or pruned linear layer with what was fused into it.

    `choice`: `torch`, `direct` (oneDNN, packed), `gemm`, `amx`, a Winograd algorithm, `sparse` or `scattered`. `times`:
    choice -> median milliseconds inside the network, empty where the choice was forced. `error`: relative L2 distance
    from torch's result for the same input and folded weight. `density`: share of the weights that are not zero, of a
    layer of the Winograd domain and of a linear one. `rejected`: faster choices whose error was too large.
    `narrow`: the result stays bfloat16 in memory.
    """

    name: str
    kind: str
    input: tuple[int, ...]
    choice: str
    times: dict[str, float]
    error: float
    density: float | None = None
    rejected: tuple[str, ...] = ()
    narrow: bool = False


@dataclass(frozen=True)
class LoweredReport:
    """`error`: the largest relative L2 distance of an output from the original network's. `folded`: batch norms, scales
    and shifts that are now part of a weight. `other`: operator -> how often it is left as it was. `batch` and `threads`
    are those of the measurement. `passes`: median milliseconds of the whole network lowered, as it was, and as it was
    in channels-last memory; empty where a choice was forced, or where only parts are lowered. `kept`: one of the latter
    two was faster, and was taken."""

    layers: tuple[LoweredLayer, ...]
    error: float
    folded: int
    other: dict[str, int]
    batch: int
    threads: int
    notes: tuple[str, ...] = ()
    passes: dict[str, float] = field(default_factory=dict[str, float])
    kept: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("LAYER", "COMPUTES", "INPUT", "DENSITY", "KERNEL", "MS", "DENSE MS", "ERROR")
        rows = [head, *map(_row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        other = ", ".join(f"{count} {name}" for name, count in sorted(self.other.items())) or "nothing"
        passes = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.passes.items())
        lines += [
            "",
            f"relative error of the outputs  {self.error:.1e}",
            f"folded into weights            {self.folded} batch norms, scales and shifts",
            f"left as it was                 {other}",
            f"measured with                  batch {self.batch}, {self.threads} thread(s)",
            *([f"a pass of the network          {passes}"] if passes else []),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _row(layer: LoweredLayer) -> tuple[str, ...]:
    own = layer.times.get(layer.choice)
    # Of a layer of the Winograd domain the generated kernel that does not know what is pruned.
    winograd = min((t for name, t in layer.times.items() if name in WINOGRAD), default=None)
    # Of a linear layer there is torch's own only.
    dense = layer.times.get("direct", layer.times.get("torch") if winograd is None else winograd)
    times = ("" if own is None else f"{own:.3f}", "" if dense is None else f"{dense:.3f}")
    choice = layer.choice + "".join(f" (not {name}: error)" for name in layer.rejected)
    density = "" if layer.density is None else f"{layer.density:.3f}"
    size = "x".join(map(str, layer.input))
    return (layer.name, layer.kind, size, density, choice, *times, f"{layer.error:.1e}")
