"""The scoreboard: which networks can be pruned to half of their channels, and is the result right?

    python -m benchmarks.any_cnn PROGRESS.jsonl          what tersenet and Torch-Pruning can prune; about an hour
    python -m benchmarks.any_cnn PROGRESS.jsonl --times  and times, on a quiet machine; about an hour more

From the repository's root, with torchvision, timm and torch-pruning installed. What stands in the progress file is not
done again; at the end any_cnn.json (beside this file) and docs/any_cnn.md are written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from benchmarks.any_cnn import networks, ours, page, peer, progress, times
from benchmarks.any_cnn.child import watched
from torch import nn

from tersenet.environment import environment, installed
from tersenet.models.torchvision_cpu import ready

HERE = Path(__file__).parent


def main() -> None:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the network at work is ended too
    warm_up()
    names = networks.all_networks()
    tools = ["ours", "peer", *(["times"] if options.times else [])]
    known = json.loads((HERE / "any_cnn.json").read_text())["networks"] if options.go_on else []
    done = {**progress.of_table(known), **progress.read(options.progress)}
    for name, tool in progress.missing(networks.chosen(names, options.only), tools, done, options.again):
        if tool == "times" and done.get((name, "ours"), {}).get("result") != "exact":
            continue
        fine = done.get((name, "peer"), {}).get("result") == "ok"
        find = {"ours": ours.prune, "peer": peer.prune, "times": partial(times.prune, peer=fine)}[tool]
        began = time.perf_counter()
        found = watched(find, name, options.seconds, options.memory)
        done[name, tool] = found
        progress.append(options.progress, name, tool, found)
        print(f"{name} {tool}: {found.get('result')} ({time.perf_counter() - began:.0f} s)", flush=True)
    given = " ".join(sys.argv[1:]).replace(str(options.progress), "PROGRESS.jsonl")
    result = {"environment": described(), "command": f"python -m benchmarks.any_cnn {given}"}
    result["networks"] = progress.table(names, done)
    (HERE / "any_cnn.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE.parents[1] / "docs" / "any_cnn.md").write_text(page.render(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("progress", type=Path, help="JSON-lines file of what is done, made if it is not there")
    parser.add_argument("--go-on", action="store_true", help="what any_cnn.json has need not be done again")
    parser.add_argument("--only", help="glob of networks, such as 'timm:*' or 'resnet*'")
    parser.add_argument("--again", help="glob of networks to do once more, such as '*swin*'")
    parser.add_argument("--times", action="store_true", help="measure times too")
    parser.add_argument("--seconds", type=float, default=120, help="limit on the processor time of a network (120)")
    parser.add_argument("--memory", type=float, default=6, help="GiB that one network may take (6)")
    return parser


def warm_up() -> None:
    """Imports, and what both tools do once in a process, so that no network's time has it."""
    torch.set_num_threads(1)
    ready()
    import timm  # noqa: F401
    import torch_pruning as tp
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # torch.export shows progress with it, and its monitor is a thread

    def tiny() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()

    example = (torch.zeros(1, 3, 8, 8),)
    graph = ours.ModelGraph(tiny(), example)
    ours.compact(graph, ours.weakest_removed(graph))
    tp.pruner.BasePruner(tiny(), example, importance=tp.importance.GroupMagnitudeImportance(p=2)).step()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise SystemExit(f"{threads} threads are running, so that forking is not safe; set OMP_NUM_THREADS=1")


def described() -> dict[str, object]:
    packages = ("torchvision", "timm", "torch-pruning")
    return {**environment("cpu"), **{package: installed(package) for package in packages}}


if __name__ == "__main__":
    main()
