"""Whole networks lowered, beside every runtime that is installed: VGG-16, ResNet-18, ResNet-50 and MobileNetV2.

    python -m benchmarks.lower_networks
    python -m benchmarks.lower_networks --half --network resnet18 vgg16 resnet50

224 x 224, float32 (with --half bfloat16, on the peers that have it), random weights: this is about time, not accuracy.
Batches of 1 and 8, one and two threads; all runtimes in turns, as `tersenet bench` has them. `ratios`: how many times
longer the best of those without Winograd kernels (`direct`), the best of ncnn and MNN (`winograd`) and torch eager
take. Nothing else should run meanwhile. MobileNetV2 is torchvision's.

Writes lower_networks.json and .svg (with --half lower_networks_half.json and .svg) beside this file after each row, and
goes on behind the rows that are there; --fresh measures all of them again. Each row is a process of its own, so that no
runtime's threads or memory are left over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tersenet.lowering.picture import draw

RESULT = Path(__file__).with_suffix(".json")
HALF_RESULT = RESULT.with_stem("lower_networks_half")
NETWORKS = ("vgg16", "resnet18", "resnet50", "torchvision:mobilenet_v2")
PEERS = ("eager", "compile", "onnxruntime", "openvino", "ncnn", "mnn")
KINDS = {"direct": ("eager", "compile", "onnxruntime", "openvino"), "winograd": ("ncnn", "mnn"), "eager": ("eager",)}
ROUNDS = {1: 30, 8: 10}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", default=NETWORKS)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="*", default=list(ROUNDS))
    parser.add_argument("--peer", nargs="*", default=PEERS)
    parser.add_argument("--rounds", type=int, help="of each row; by default 30, and 10 for a batch of 8")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--row", nargs=3, metavar=("NETWORK", "BATCH", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.result = options.result or (HALF_RESULT if options.half else RESULT)
    if options.row:
        network, batch, threads = options.row
        print(json.dumps(row(network, int(batch), int(threads), options.rounds, options.peer, options.half)))
        return
    rows: list[Row] = []
    if options.result.is_file() and not options.fresh:
        rows = json.loads(options.result.read_text())["rows"]
    known = {(one["network"], one["batch"], one["threads"]) for one in rows}
    for network, batch, threads in itertools.product(options.network, options.batch, options.threads):
        if (network, batch, threads) in known:
            continue
        rows.append(in_a_process(network, batch, threads, options))
        options.result.write_text(json.dumps(result(rows, options.half), indent=1) + "\n")
        picture(rows, options.result.with_suffix(".svg"))
        print(table(rows[-1:]), flush=True)
    print(table(rows))


def in_a_process(network: str, batch: int, threads: int, options: argparse.Namespace) -> Row:
    rounds = options.rounds or ROUNDS.get(batch, 10)
    command = [sys.executable, "-m", "benchmarks.lower_networks", "--row", network, str(batch), str(threads)]
    command += ["--rounds", str(rounds), "--peer", *options.peer, *(["--half"] if options.half else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(network: str, batch: int, threads: int, rounds: int, peers: list[str], half: bool) -> Row:
    """One network, batch and number of threads: times, and what was lowered."""
    import torch

    from tersenet import api
    from tersenet.lowering.bench import bench

    torch.manual_seed(0)
    model, example = api.open_example(network, batch=batch)
    found, fast = bench(model, example, peers=peers, threads=threads, rounds=rounds, half=half)
    document = found.to_dict()
    return {
        "network": network,
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
        "half": half,
        "ratios": ratios({name: timing.median_ms for name, timing in found.timings.items()}),
        "timings": document["timings"],
        "missing": found.missing,
        "lowered": fast.report.to_dict(),
        "environment": found.environment,
    }


def ratios(medians: dict[str, float]) -> dict[str, Any]:
    """Kind of runtime -> the best one, and how many times longer it takes than the lowered network."""
    found: dict[str, Any] = {}
    for kind, peers in KINDS.items():
        present = [peer for peer in peers if peer in medians]
        if present:
            best = min(present, key=medians.__getitem__)
            found[kind] = {"peer": best, "times_faster": medians[best] / medians["tersenet"]}
    return found


def result(rows: list[Row], half: bool) -> dict[str, Any]:
    return {
        "claim": f"latency of lowered networks beside other runtimes, {'bfloat16' if half else 'float32'}",
        "command": " ".join(["python -m benchmarks.lower_networks", *sys.argv[1:]]),
        "rows": rows,
    }


def picture(rows: list[Row], path: Path) -> None:
    from tersenet.lowering.bench import Timing

    panels = {
        f"{one['network'].rpartition(':')[2]}, batch {one['batch']}, {one['threads']} thread(s)": {
            name: Timing(**timing) for name, timing in one["timings"].items()
        }
        for one in rows
    }
    draw(panels, path)


def table(rows: list[Row]) -> str:
    """Medians in milliseconds, and ratios."""
    lines: list[str] = []
    for one in rows:
        times = "  ".join(f"{name} {timing['median_ms']:.2f}" for name, timing in one["timings"].items())
        against = "  ".join(f"{kind} {r['times_faster']:.2f} ({r['peer']})" for kind, r in one["ratios"].items())
        lines.append(f"{one['network']} batch {one['batch']} threads {one['threads']}: {times} ms; {against}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
