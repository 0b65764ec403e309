"""What is known so far: one JSON line for each network and tool, appended when it is done; the last counts."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Done = dict[tuple[str, str], dict[str, Any]]
"""(network, tool) -> what was found."""


def read(path: Path) -> Done:
    """A line that a kill cut short is skipped: its network is done again."""
    done: Done = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            done[record.pop("network"), record.pop("tool")] = record
        except (ValueError, KeyError):
            continue
    return done


def append(path: Path, network: str, tool: str, found: dict[str, Any]) -> None:
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut_short else "") + json.dumps({"network": network, "tool": tool, **found}) + "\n")


def missing(networks: list[str], tools: list[str], done: Done, again: str | None) -> list[tuple[str, str]]:
    """What is still to do, in order; `again` is a glob of networks to do once more."""
    return [
        (network, tool)
        for network in networks
        for tool in tools
        if (network, tool) not in done or (again is not None and fnmatch(network, again))
    ]


def table(networks: list[str], done: Done) -> list[dict[str, Any]]:
    """One row for each network of which anything is known."""
    rows = [{"network": n, **{tool: found for (name, tool), found in done.items() if name == n}} for n in networks]
    return [row for row in rows if len(row) > 1]


def of_table(rows: list[dict[str, Any]]) -> Done:
    """What a table of an earlier run knows."""
    return {(row["network"], tool): found for row in rows for tool, found in row.items() if tool != "network"}
