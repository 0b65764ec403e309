"""Compress a built-in network through the API, save it, load it elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import tersenet as tn


def main(epochs: int = 6) -> None:
    result = tn.compress(
        "resnet8",
        "sfp_digits",
        target="macs=60%",
        overrides={"steps.0.fit.epochs": epochs, "steps.1.fit.epochs": epochs},
    )
    before, after = result.report.before, result.report.after
    print(f"MACs {before.macs:,} -> {after.macs:,}, top-1 {before.top1:.2%} -> {after.top1:.2%}")

    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "small")
        net = tn.load(Path(folder) / "small")
    image = torch.zeros(1, 1, 8, 8)
    assert torch.equal(net(image), result.model(image))


if __name__ == "__main__":
    main()
