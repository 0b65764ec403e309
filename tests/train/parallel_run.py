"""One rank of a data-parallel training, started by torchrun; prints what it ends with as JSON. See test_distributed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from train_support import Batches, Recorder, data, digest, everything, network, plain_network, settings_of, train

from tersenet.train import distributed
from tersenet.train.evaluate import evaluate
from tersenet.train.recalibrate import recalibrate_bn


class Stop(Recorder):
    def after_epoch(self, state: Any) -> dict[str, Any]:
        if state.epoch == 2:
            raise KeyboardInterrupt
        return super().after_epoch(state)


def main(folder: Path) -> None:
    with distributed.process_group("cpu") as device:
        rank, world = distributed.rank(), distributed.world()
        shares = data(rank=rank, world=world)
        logged: list[Any] = []

        def run(name: str, hooks: Recorder) -> tuple[torch.nn.Module, Any]:
            # Every rank starts from weights of its own: rank 0's must win.
            model = network(rank)
            more: dict[str, Any] = {"hooks": hooks, "checkpoint": folder / name, "device": device, "data": shares}
            return model, train(model, everything(), teacher=network(5), log=logged.append, **more)

        model, rows = run("whole.pt", Recorder())
        try:
            run("stopped.pt", Stop())
        except KeyboardInterrupt:
            resumed, _ = run("stopped.pt", Recorder())
        # 45 samples: the shares differ in size.
        accuracy = evaluate(model, Batches(45, 7, 2, shuffle=False, rank=rank, world=world), device=device)
        plain = plain_network()
        train(plain, settings_of(), data=shares, device=device)
        recalibrated = network()
        recalibrate_bn(recalibrated, shares.train, 3, device=device)
        result = {
            "rank": rank,
            "world": world,
            "weights": digest(model),
            "resumed": digest(resumed),
            "recalibrated": digest(recalibrated),
            "rows": [row | {"seconds": 0} for row in rows],
            "logged": sum(row["kind"] == "epoch" for row in logged),
            "accuracy": accuracy.model_dump(),
        }
        if rank == 0:
            torch.save(model.state_dict(), folder / "weights.pt")
            torch.save(plain.state_dict(), folder / "plain.pt")
        (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
