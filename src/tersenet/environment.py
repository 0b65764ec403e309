"""Where a result is made: device, versions, processor, threads. No names of machines or people."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersenet.errors import TersenetError

if TYPE_CHECKING:
    import torch


def environment(device: str) -> dict[str, Any]:
    """A plain dict for reports."""
    import torch

    return {
        "tersenet": installed("tersenet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}",
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_named(name: str | None) -> torch.device:
    """None: a GPU if there is one.

    Raises: TersenetError for anything that tersenet or torch can't run on here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TersenetError(f"device {name!r} is not known to torch; use cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise TersenetError(f"device {name!r} is not one that tersenet runs on; use cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TersenetError(f"device {name!r}: torch can use {torch.cuda.device_count()} CUDA devices here")
    return device
