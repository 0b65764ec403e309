"""Your own network, your own data, your own metric: nothing has to be registered or rewritten."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tersenet as tn


class Net(nn.Module):
    """Two branches, joined; 1 -> 2 classes: is the left half of the image brighter than the right half?"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.near = nn.Conv2d(16, 16, 1)
        self.far = nn.Conv2d(16, 16, 5, padding=2)
        self.head = nn.Linear(32 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(torch.cat((self.near(x), self.far(x)), 1))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def loaders(n: int = 512) -> dict[str, object]:
    """What `data` may be: loaders, and if you like a loss and a metric of your own."""
    x = torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    y = (x[..., :6].mean((1, 2, 3)) > x[..., 6:].mean((1, 2, 3))).long()
    train, test = TensorDataset(x[64:], y[64:]), TensorDataset(x[:64], y[:64])
    return {
        "train": DataLoader(train, batch_size=32, shuffle=True),
        "test": DataLoader(test, batch_size=64),
        "metric": lambda outputs, targets: (outputs.argmax(1) == targets).float(),
    }


def main(epochs: int = 10) -> None:
    fit = {"epochs": epochs, "lr": 0.02, "schedule": "cosine"}
    recipe = {"name": "own", "steps": [{"method": "soft_filter_pruning", "revive": "momentum", "fit": fit}]}
    result = tn.compress(Net(), recipe, data=loaders(), target="macs=50%")
    print(f"MACs {result.report.before.macs:,} -> {result.report.after.macs:,}")

    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        # A file can't hold your class: loading asks for a fresh instance of it.
        again = tn.load(folder, base=Net())
    image = torch.rand(1, 1, 12, 12)
    assert torch.equal(again(image), result.model(image))


if __name__ == "__main__":
    main()
