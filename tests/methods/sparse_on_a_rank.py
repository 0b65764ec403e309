"""One rank of a run of sparse_winograd, started by torchrun; writes its masks as JSON. See fact S8."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sparse_support import data, net, trained

from tersenet.nn.masked import masked_layers
from tersenet.train import distributed


def main(folder: Path) -> None:
    with distributed.process_group("cpu"):
        rank = distributed.rank()
        # Weights and images of its own on every rank.
        model = net(rank)
        fit = {"epochs": 3, "lr": 0.05, "weight_decay": 0.01}
        stages = {"stages": (0.8, 0.5, 0.25), "schedule": "iterative"}
        trained(model, given=data(4, rank), fit=fit, **stages)
        layers = masked_layers(model)
        masks = {name: layer.mask.flatten().tolist() for name, layer in layers.items() if layer.mask is not None}
        zero = all(not layer.weight.detach()[~layer.mask].any() for layer in layers.values() if layer.mask is not None)
        (folder / f"rank{rank}.json").write_text(json.dumps({"masks": masks, "zero": zero}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
