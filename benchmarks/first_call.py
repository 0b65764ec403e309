"""What the first call of a lowered network costs in a fresh process, beside the first call of the network itself.

    python -m benchmarks.first_call

224 x 224, one image, one thread unless --threads says otherwise. `warm`: this machine has lowered the network before.
`retrained`: it has lowered one like it, with other weights, so that the lowered network has to be checked. `cold`:
TERSENET_CACHE is an empty folder, so kernels are compiled, and timed in the network. Each number is from a process of
its own that has imported torch and tersenet and read the network from a file: `eager` is its first call, the others are
`lower` and the first call, with everything that they import. `extra_s` is the difference of the medians of wall time;
the processor time of each process is kept too. Nothing else should run meanwhile.

Writes first_call.json beside this file after each network, and goes on behind those that are there; --fresh measures
all again. About ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_suffix(".json")
NETWORKS = ("resnet18", "resnet50", "vgg16", "torchvision:mobilenet_v2")
KINDS = ("warm", "retrained", "cold")
GOALS = {"warm": 1.0, "cold": 20.0}
"""Seconds over eager: of any network, and of ResNet-18."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", default=NETWORKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="processes for each number")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("FILE", "KIND", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, kind, threads = options.child
        print(json.dumps(first_call(Path(path), kind, int(threads))))
        return
    rows: list[dict[str, Any]] = []
    if options.result.is_file() and not options.fresh:
        rows = json.loads(options.result.read_text())["rows"]
    for name in options.network:
        if (name, options.threads) not in {(row["network"], row["threads"]) for row in rows}:
            rows.append(measured(name, options.threads, options.runs))
            options.result.write_text(json.dumps(result(rows), indent=1) + "\n")
    for row in rows:
        extra = ", ".join(f"{kind} {row['extra_s'][kind]:.2f} s over eager" for kind in KINDS)
        print(f"{row['network']}, {row['threads']} thread(s): eager {row['median_s']['eager']:.2f} s, {extra}")


def measured(name: str, threads: int, runs: int) -> dict[str, Any]:
    """One network: the first calls in `runs` processes each."""
    import torch

    from tersenet.api import open_model
    from tersenet.environment import environment

    with tempfile.TemporaryDirectory() as folder:
        paths, caches = [Path(folder) / f"network {number}.pt" for number in range(runs + 1)], Path(folder) / "caches"
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            torch.save(open_model(name)[0].eval(), path)

        def run(kind: str, cache: str, path: Path = paths[0]) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.first_call", "--child", str(path), kind, str(threads)]
            variables = {**os.environ, "TERSENET_CACHE": str(caches / cache), "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
            return json.loads(done.stdout.splitlines()[-1])

        cold = [run("lowered", f"cold {number}") for number in range(runs)]
        times = {"eager": [run("eager", "none") for _ in range(runs)], "cold": cold}
        times["warm"] = [run("lowered", "cold 0") for _ in range(runs)]
        times["retrained"] = [run("lowered", "cold 0", path) for path in paths[1:]]
    medians = {kind: statistics.median(one["wall_s"] for one in found) for kind, found in times.items()}
    return {
        "network": name,
        "threads": threads,
        "runs": runs,
        "median_s": medians,
        "extra_s": {kind: medians[kind] - medians["eager"] for kind in KINDS},
        "times": times,
        "environment": environment("cpu"),
    }


def first_call(path: Path, kind: str, threads: int) -> dict[str, float]:
    """Seconds that the first output of a network takes in this process."""
    import time

    import torch

    import tersenet as tn

    torch.set_num_threads(threads)
    model: torch.nn.Module = torch.load(path, weights_only=False)  # written by `measured`
    x = torch.randn(1, 3, 224, 224)
    start, busy = time.perf_counter(), time.process_time()
    with torch.no_grad():
        (model if kind == "eager" else tn.lower(model, x))(x)
    return {"wall_s": time.perf_counter() - start, "processor_s": time.process_time() - busy}


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "claim": "seconds that lower and the first call take over the network's own first call, in a fresh process",
        "command": " ".join(["python -m benchmarks.first_call", *sys.argv[1:]]),
        "goals_s": GOALS,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
