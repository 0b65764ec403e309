"""What 3C costs on VGG-16 at 224x224: seconds and memory for published ranks, from calibration to the saved network.

    OMP_NUM_THREADS=2 python -m benchmarks.vgg16_3c --images 500

Weights and images are random: neither changes the cost. Checked on the way: the small network equals the one that was
fitted, and the network that is loaded equals the one that was saved. With 500 images it writes vgg16_3c.json beside
this file; other numbers of images are printed only.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import torch
from torch import Tensor

from tersenet.data.bundle import Data
from tersenet.environment import environment
from tersenet.exporting import artifact
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context, TrainingMethod
from tersenet.models.open import Source, example_of
from tersenet.recipe import load_recipe

RECIPE = "channel_pruning_3c_vgg16_4x"
IMAGES = 500
BATCH = 10
SHAPE = (3, 224, 224)


@dataclass
class Noise:
    """Batches of seeded noise."""

    n: int

    def __len__(self) -> int:
        return -(-self.n // BATCH)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for start in range(0, self.n, BATCH):
            count = min(BATCH, self.n - start)
            yield torch.randn(count, *SHAPE, generator=generator), torch.zeros(count, dtype=torch.long)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args()
    noise = Noise(options.images)
    data = Data("noise", noise, noise, None, classes=1000, shape=SHAPE, normalise=((0.0,) * 3, (1.0,) * 3))
    torch.manual_seed(0)
    model = Source("vgg16").open(SHAPE, 1000)
    whole = ModelGraph(model, example_of(model, batch=2)).macs()
    rows: list[dict[str, Any]] = []
    for step in load_recipe(RECIPE).steps:
        if isinstance(step, TrainingMethod):
            continue
        graph = ModelGraph(model, example_of(model, batch=2))
        context = Context(torch.device("cpu"), 0, None, graph.macs(), graph.params(), data)
        used = step.model_copy(update={"images": options.images}) if "images" in type(step).model_fields else step
        began, cpu = monotonic(), process_time()
        used.apply(graph, context)
        row: dict[str, Any] = {"method": step.method, "seconds": round(monotonic() - began, 1)}
        row |= {"cpu_seconds": round(process_time() - cpu, 1), "macs_left": graph.macs() / whole}
        row["masked_compact"] = context.equality.relative if context.equality is not None else 0.0
        row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        artifact.save(model, Path(folder))
        x = next(noise.batches(1))[0][:2]
        loaded = bool(torch.equal(artifact.load(folder)(x), model.eval()(x)))
    result = {
        "claim": f"3C of VGG-16 at 224x224 on {options.images} images: time, memory, exactness",
        "runs_each": 1,
        "environment": environment("cpu"),
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python -m benchmarks.vgg16_3c --images {options.images}",
        "images": options.images,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "loaded_equals_saved": loaded,
        "steps": rows,
    }
    print(json.dumps(result))
    if options.images == IMAGES:
        Path(__file__).with_name("vgg16_3c.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
