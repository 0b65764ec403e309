"""How much of each layer goes, found by trials (AMC), and then pruned with that."""

from __future__ import annotations

import tersenet as tn


def main(epochs: int = 6) -> None:
    recipe = {"name": "train", "steps": [{"method": "train", "fit": {"epochs": epochs, "lr": 0.05}}]}
    trained = tn.compress("resnet8", recipe, data="digits").model

    found = tn.search_rates(trained, "digits", "macs=50%", episodes=8 * epochs, images=200, samples=100)
    print({layer.name: f"{layer.kept} of {layer.channels}" for layer in found.layers})

    report = tn.compress(trained, found.recipe(), data="digits").report
    print(f"MACs {report.before.macs:,} -> {report.after.macs:,}, top-1 {report.before.top1} -> {report.after.top1}")
    assert report.after.macs == found.chosen.macs


if __name__ == "__main__":
    main()
