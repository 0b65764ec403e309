"""One rank of wiNAS's searches and of an adaptation, started by torchrun; writes what came out as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_winas import IMAGES, LABELS, Batches, context, graph_of, net, table

from tersenet.methods.base import Method, TrainingMethod
from tersenet.methods.winas import Winas, WinogradKnapsack
from tersenet.methods.winograd_aware import WinogradAware
from tersenet.nn.winograd import WinogradConv2d
from tersenet.train import distributed
from tersenet.train.loop import fit
from tersenet.train.settings import Fit


class Share(Batches):
    """Every rank has other images."""

    def batches(self, epoch: int) -> Any:
        generator = torch.Generator().manual_seed(2 * (epoch % 1000) + distributed.rank())
        order = torch.randperm(32, generator=generator)
        return iter([(IMAGES[part], LABELS[part]) for part in order.split(8)])


def methods(folder: Path) -> list[Method]:
    """A table of its own on every rank, as measuring gives: rank 0's must win."""
    rank = distributed.rank()
    where = table(folder / f"table{rank}.json", **({"F2": 0.9, "F4": 0.3} if rank == 0 else {"F2": 0.3, "F4": 0.9}))
    more: dict[str, Any] = {"latency": where, "bits": (None, 2)}
    settings = Fit(epochs=2, lr=0.01)
    return [
        Winas(fit=settings, flex="full", logits_lr=0.3, latency_weight=0.3, **more),
        WinogradKnapsack(share=0.8, **more),
        WinogradAware(fit=settings, flex="full", scale="learned"),
    ]


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    with distributed.process_group("cpu") as device:
        for method in methods(folder):
            model, done = net(), context()
            assert done.data is not None
            done.data = dataclasses.replace(done.data, train=Share(), validation=Share())
            graph = graph_of(model)
            method.apply(graph, done)
            if isinstance(method, TrainingMethod):
                hooks = method.hooks(graph, done)
                more: dict[str, Any] = {"seed": 3, "device": device, "hooks": hooks, "checkpoint": None}
                fit(model, done.data, method.fit, log=lambda row: None, **more)
                method.finish(graph, done, hooks)
            digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values()))
            layers = {n: m.settings.tile for n, m in model.named_modules() if isinstance(m, WinogradConv2d)}
            found[method.method] = {"state": digest.hexdigest(), "layers": layers, "notes": done.notes}
        (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
