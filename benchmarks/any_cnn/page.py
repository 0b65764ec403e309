"""docs/any_cnn.md from the scoreboard's JSON: totals on top, then causes, then every network."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

Row = dict[str, Any]

FEW_MACS = 0.30
"""Half of all channels leaves about a quarter of the MACs; above this share the table says why."""

OUTPUT = "the network's output"
"""Stays in every network, and explains nothing."""

INTRO = """# Any CNN: the scoreboard

Each network is built with random weights and random norm statistics, in float64, on one thread, in a process with
limits on time and memory. Half of the units of every free channel group go, those with the least L2 norm; no hints are
given. **exact**: the compact network computes what the masked one does, to 1e-9 of the largest value of each output, on
images that were not used before; the masked network is built beside tersenet's own check. Where a norm takes
statistics over channels (layer norm, group norm), zeroing is not removing: there, marked *, the masked network takes
them over the kept channels only.

Torch-Pruning gets the same weights: **ok** means that a forward pass runs, **exact** that it also computes what the
masked network does (with statistics over all channels: where a norm takes such, the comparison does not hold).

MACs are counted by torch's flop counter at the network's own input size, in detectors without the heads that run once
for every box. Seconds are processor time of tracing, grouping, choosing and removing, tersenet's own equality check
included, both tools in turns; there both remove the channels with their norms' scales and biases. Time left is that of
a forward pass in float32, batch 1, one thread. Written by `python -m benchmarks.any_cnn`; do not edit.
"""


def render(result: dict[str, Any]) -> str:
    rows = result["networks"]
    parts = [INTRO, _totals(rows), _both(rows), _causes(rows), _networks(rows), _where(result)]
    return "\n".join(parts)


def cause(reason: str) -> str:
    """A reason without what belongs to one network: where it was, and numbers."""
    reason = re.sub(r" in \S+ \(\S+:\d+\)| \(\S+:\d+\)| \(at \S+:\d+\)", "", reason)
    reason = re.sub(r"^\S+ (can't be traced|does not run)", r"it \1", reason)
    return re.sub(r"\d+([.e+-]+\d+)*", "N", reason).split(". ")[0]


def macs_left(row: Row, tool: str) -> float | None:
    after = row.get(tool, {}).get("after")
    return after["macs"] / row["ours"]["before"]["macs"] if after and "before" in row.get("ours", {}) else None


def _ours(row: Row, result: str) -> bool:
    return row.get("ours", {}).get("result") == result


def _peer_ok(row: Row) -> bool:
    return row.get("peer", {}).get("result") == "ok"


def _totals(rows: list[Row]) -> str:
    def trait(attention: bool, norms: bool) -> Callable[[Row], bool]:
        return lambda r: (r.get("ours", {}).get("attention"), r.get("ours", {}).get("norms")) == (attention, norms)

    kinds: dict[str, Callable[[Row], bool]] = {
        "all": lambda r: True,
        **{kind: lambda r, k=kind: r["network"].startswith(k) for kind in sorted({_kind(r) for r in rows})},
        "convolutional": trait(False, False),
        "convolutional, norms over channels": trait(False, True),
        "with attention": lambda r: bool(r.get("ours", {}).get("attention")),
    }
    lines = [
        "## Totals\n",
        "| networks | number | exact | different | refused | other | Torch-Pruning: ok | exact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, belongs in kinds.items():
        chosen = [row for row in rows if belongs(row)]
        counts = [sum(_ours(row, result) for row in chosen) for result in ("exact", "different", "refused")]
        ok = sum(map(_peer_ok, chosen))
        exact = sum(bool(row.get("peer", {}).get("exact")) for row in chosen)
        lines.append(_line(title, len(chosen), *counts, len(chosen) - sum(counts), ok, exact))
    return "\n".join(lines) + "\n"


def _both(rows: list[Row]) -> str:
    """Times over the networks that both tools can do, and what is left over all that are exact."""
    lines: list[str] = []
    timed = [row["times"] for row in rows if "ours_s" in row.get("times", {})]
    both = [times for times in timed if "peer_s" in times]
    if both:
        ours, theirs = ([times[key] for times in both] for key in ("ours_s", "peer_s"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        lines.append(
            f"Networks that both do: {len(both)}. Seconds, median (largest): tersenet {median(ours):.2f} "
            f"({max(ours):.1f}), Torch-Pruning {median(theirs):.2f} ({max(theirs):.1f}); median of the ratios "
            f"{median(ratios):.2f}. All that tersenet does: largest {max(times['ours_s'] for times in timed):.1f}."
        )
    left = [share for row in rows if _ours(row, "exact") and (share := macs_left(row, "ours")) is not None]
    if left:
        few = sum(share <= FEW_MACS for share in left)
        lines.append(f"MACs left, median of {len(left)} exact: {median(left):.3f}; at most {FEW_MACS:.2f} in {few}.")
    ratios = [row["times"]["ratio"] for row in rows if "ratio" in row.get("times", {})]
    if ratios:
        lines.append(f"Time of a forward pass left, batch 1, median of {len(ratios)}: {median(ratios):.2f}.")
    return "\n".join(lines) + "\n"


def _causes(rows: list[Row]) -> str:
    failed = [row for row in rows if not _ours(row, "exact") and "ours" in row]
    stopped = _grouped((f"{r['ours']['result']}: {cause(r['ours'].get('reason', ''))}", _leaf(r)) for r in failed)
    held = _grouped(
        (cause(why), _leaf(r)) for r in rows for why, _ in r.get("ours", {}).get("frozen", ()) if why != OUTPUT
    )
    return "\n".join(
        ["## Why a network is not done\n", *_cause_table(stopped), "\n## Why channels stay\n", *_cause_table(held), ""]
    )


def _grouped(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for why, network in found:
        if network not in groups[why]:
            groups[why].append(network)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _cause_table(groups: dict[str, list[str]]) -> list[str]:
    lines = ["| networks | cause | such as |", "|---|---|---|"]
    return lines + [_line(len(names), why, ", ".join(names[:4])) for why, names in groups.items()]


def _networks(rows: list[Row]) -> str:
    lines = [
        "## Networks\n",
        "| network | tersenet | error | units free | MACs left | time left | s | Torch-Pruning | exact | MACs left | s "
        "| remark |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, peer = row.get("ours", {}), row.get("peer", {})
        lines.append(
            _line(
                row["network"],
                f"{ours.get('result', '')}{'*' if ours.get('kept_statistics') else ''}",
                _number(ours.get("error"), ".0e"),
                _number(ours.get("free"), ".0%"),
                _number(macs_left(row, "ours"), ".2f"),
                _number(row.get("times", {}).get("ratio"), ".2f"),
                _number(row.get("times", {}).get("ours_s"), ".1f"),
                peer.get("result"),
                {True: "yes", False: "no"}.get(peer.get("exact"), ""),
                _number(macs_left(row, "peer"), ".2f"),
                _number(row.get("times", {}).get("peer_s"), ".1f"),
                _remark(row),
            )
        )
    return "\n".join(lines) + "\n"


def _remark(row: Row) -> str:
    ours = row.get("ours", {})
    if ours.get("result") != "exact":
        return ours.get("reason", "")
    left = macs_left(row, "ours")
    if left is None or left <= FEW_MACS:
        return ""
    held: Counter[str] = Counter()
    for why, units in ours["frozen"]:
        if why != OUTPUT:
            held[cause(why)] += units
    return "; ".join(why for why, _ in held.most_common(1))


def _where(result: dict[str, Any]) -> str:
    return "Made with: " + ", ".join(f"{key} {value}" for key, value in result["environment"].items()) + ".\n"


def _kind(row: Row) -> str:
    return row["network"].partition(":")[0]


def _leaf(row: Row) -> str:
    return row["network"].partition(":")[2]


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _line(*cells: object) -> str:
    return "| " + " | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in cells) + " |"
