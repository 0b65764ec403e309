"""What the accuracy benchmarks share: a trained CIFAR ResNet, its data, and a method applied to a copy of it."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.environment import environment
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context, Method
from tersenet.models.open import Source, example_of
from tersenet.recipe_target import Target
from tersenet.train.evaluate import evaluate

CPU = torch.device("cpu")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--weights", required=True, help="file of published weights")
    return parser


def opened(name: str, options: argparse.Namespace) -> tuple[nn.Module, Data]:
    source = Source(name, options.weights)
    data = load_data(DataSettings(source=options.data, batch_size=128), seed=0, normalise=source.normalise)
    return source.open(data.shape, data.classes, data.normalise), data


def applied(method: Method, model: nn.Module, data: Data, target: Target | None = None) -> tuple[nn.Module, float]:
    """A copy of the network with the method applied to it, and the share of the multiply-adds that is left."""
    model = copy.deepcopy(model)
    graph = ModelGraph(model, example_of(model, batch=2))
    context = Context(CPU, 0, target, graph.macs(), graph.params(), data)
    whole = graph.macs()
    method.apply(graph, context)
    return model, ModelGraph(model, graph.example).macs() / whole


def figures(model: nn.Module, data: Data) -> dict[str, Any]:
    """Top-1 on the test images."""
    assert data.test is not None
    accuracy = evaluate(model, data.test, device=CPU)
    return {"top1": accuracy.top1, "correct": accuracy.correct, "n": accuracy.n}


def described(claim: str, script: str, options: argparse.Namespace, more: str = "") -> dict[str, Any]:
    command = (
        f"python -m benchmarks.{Path(script).stem}{more} --data cifar10:DIR --weights {Path(options.weights).name}"
    )
    return {"claim": claim, "runs_each": 1, "environment": environment("cpu"), "command": command}


def measured_rows(
    result: dict[str, Any],
    path: Path,
    cases: Iterable[dict[str, Any]],
    made: Callable[[dict[str, Any]], tuple[nn.Module, float]],
    data: Data,
    more: Callable[[nn.Module], dict[str, Any]] = lambda model: {},
) -> None:
    """A row in `path` for each case that it does not hold yet, written as soon as it is known.

    `made` gives a case's network and the share of the multiply-adds that is left; `more` of it goes into the file.
    """
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for case in cases:
        if any(case.items() <= row.items() for row in rows):
            continue
        began = time.process_time()
        model, left = made(case)
        cost = {"cpu_seconds": round(time.process_time() - began, 1), "threads": torch.get_num_threads()}
        row = {**case, **figures(model, data), "macs_left": left, **cost}
        print(json.dumps(row), flush=True)
        rows.append(row | more(model))
        path.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
