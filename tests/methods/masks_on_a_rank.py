"""One rank of a soft pruning run, started by torchrun; writes its masks as JSON. See test_sfp_facts, fact 18."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sfp_support import CLASSES, Batches, hooks_on, settings, tiny_data

from tersenet.data.bundle import Data
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.train import distributed
from tersenet.train.loop import fit


def main(folder: Path) -> None:
    with distributed.process_group("cpu") as device:
        rank = distributed.rank()
        torch.manual_seed(rank)  # weights of its own on every rank: rank 0's must win
        model = resnet_cifar(8, width=10, classes=CLASSES)
        hooks = hooks_on(model, settings(fit={"epochs": 2, "lr": 0.2}))
        whole = tiny_data()
        train = Batches(32, 16, 10 + rank)
        share = Data(whole.name, train, whole.validation, None, whole.classes, whole.shape, whole.normalise)
        fit(model, share, hooks.settings.fit, seed=3, device=device, hooks=hooks, checkpoint=None, log=lambda row: None)
        masks = {name: units.tolist() for name, units in hooks.pruned.items()}
        (folder / f"rank{rank}.json").write_text(json.dumps({"masks": masks}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
