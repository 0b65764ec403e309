"""tersenet doctor"""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from tersenet.cli.console import columns, examples, show
from tersenet.cli.options import JsonOption

EXAMPLES = examples("tersenet doctor", "tersenet doctor --json   # to attach to a bug report")

# Those that decide how fast convolutions are, as /proc/cpuinfo calls them on x86 and ARM.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "asimddp", "sve", "bf16", "i8mm")
_REQUIREMENT = re.compile(r"^(?P<name>[\w.-]+)(?:>=(?P<least>[\d.]+))?(?P<marker>\s*;.*extra.*)?")
_DISK_BYTES = 2 * 10**9


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, threads, CPU and disk; say what is missing and how to install it (exit code 1)."""
    facts = examine()
    show(facts, lambda: _text(facts), as_json)
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Facts about this machine and installation; `problems` has one line for each that needs something done."""
    packages, problems = _packages()
    disk = shutil.disk_usage(Path.cwd())
    if disk.free < _DISK_BYTES:
        problems.append(
            f"only {disk.free / 1e9:.1f} GB free in {Path.cwd()}; runs write checkpoints: use --out elsewhere"
        )
    torch_facts: dict[str, Any] = {}
    if packages.get("torch"):
        try:
            torch_facts = _torch()
        except (ImportError, OSError) as error:
            problems.append(f"torch is installed but does not load: {error}; reinstall it")
    return {
        "tersenet": metadata.version("tersenet"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "torch": torch_facts,
        "cpu": _cpu(),
        "kernels": _kernels(),
        "disk": {"folder": str(Path.cwd()), "free_bytes": disk.free},
        "problems": problems,
    }


def _packages() -> tuple[dict[str, str | None], list[str]]:
    """Installed version of each package that tersenet needs, and what is missing or too old."""
    found: dict[str, str | None] = {}
    problems: list[str] = []
    for line in metadata.requires("tersenet") or ():
        match = _REQUIREMENT.match(line)
        if match is None or match["marker"]:
            continue
        name, least = match["name"], match["least"] or "0"
        try:
            found[name] = version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
            problems.append(f"{name} is missing: pip install '{name}>={least}'")
            continue
        if _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is too old: pip install '{name}>={least}'")
    return found, problems


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _torch() -> dict[str, Any]:
    import torch

    from tersenet.environment import installed
    from tersenet.kernels.gpu.host import interpreted, problem

    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "triton": {"version": installed("triton"), "missing": problem(), "interpreted": interpreted()},
    }


def _kernels() -> dict[str, Any]:
    """The generated convolution kernels that run here, widest vectors first, and why none or not all of them do."""
    from tersenet.errors import TersenetError
    from tersenet.kernels.host import ISAS, host

    try:
        processor = host()
        best = processor.isa()
    except TersenetError as error:
        return {"instructions": [], "half": False, "amx": False, "missing": {"all": str(error)}}
    missing = {
        isa.name: f"this processor has no {', '.join(lacking)}"
        for isa in ISAS[processor.family]
        if (lacking := [name for name in isa.needs if name not in processor.features])
    }
    if problem := processor.amx_problem:
        missing["amx"] = problem
    found = {"instructions": [isa.name for isa in processor.isas()], "half": best.has_half, "missing": missing}
    return {**found, "amx": problem is None}


def _cpu() -> dict[str, Any]:
    """Model and flags from /proc/cpuinfo; elsewhere than on Linux only what Python knows."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", text, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "usable_cores": usable,
        "flags": [flag for flag in _FLAGS if flag in flags],
    }


def _kernel_line(kernels: dict[str, Any]) -> str:
    if not kernels["instructions"]:
        return f"none: {kernels['missing']['all']}"
    found = f"F2, F4, F6 with {', '.join(kernels['instructions'])}"
    found += "; weights of 16 bits too" if kernels["half"] else ""
    found += "; products on AMX's tiles" if kernels["amx"] else ""
    return found + "".join(f"; not {name}: {reason}" for name, reason in kernels["missing"].items())


def _triton_line(triton: dict[str, Any]) -> str:
    if triton["missing"] is not None:
        return f"none: {triton['missing']}"
    return f"F2, F4, F6 by Triton {triton['version']}" + (", interpreted on the CPU" if triton["interpreted"] else "")


def _text(facts: dict[str, Any]) -> str:
    cpu, torch, packages = facts["cpu"], facts["torch"], facts["packages"]
    threads = f"{torch['threads']} threads, {torch['cpu_capability']}" if torch else "does not load"
    rows = [
        ("tersenet", facts["tersenet"]),
        ("python", f"{facts['python']} on {facts['system']}"),
        ("cpu", f"{cpu['model']}, {cpu['usable_cores']} usable cores"),
        ("cpu flags", " ".join(cpu["flags"]) or "unknown"),
        ("kernels", _kernel_line(facts["kernels"])),
        ("gpus", ", ".join(torch.get("gpus", [])) or "none"),
        ("gpu kernels", _triton_line(torch["triton"]) if torch else "unknown: torch does not load"),
        ("disk", f"{facts['disk']['free_bytes'] / 1e9:.1f} GB free in {facts['disk']['folder']}"),
        ("torch", f"{packages['torch']}, {threads}" if packages.get("torch") else "MISSING"),
        *((name, version or "MISSING") for name, version in packages.items() if name != "torch"),
    ]
    problems = "".join(f"\n! {problem}" for problem in facts["problems"]) or "\nNothing is missing."
    return columns(("WHAT", "FOUND"), rows) + "\n" + problems
