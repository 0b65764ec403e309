"""ResNet-20 on CIFAR-10 as grouped convolutions, beside SFP and channel pruning after as much training. Resumable.

    python -m benchmarks.structured_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

Every row starts from the published weights, and those of one size see the same training images: `--epochs` short epochs
of 50 batches at a constant learning rate, and as many with a cosine; the first number is for 50 % of the parameters and
the second for 65 %. The first of these phases is that of the method: structured sparsification pushes weights to zero
in it and SFP zeroes filters; channel pruning is done before it. The control is trained and not compressed. Structured
sparsification leaves 50 % and 65 % of the parameters; the others get the multiply-adds that this left, and then its
parameters.

The shuffle ablation cuts the published weights to the groups that the method decides on for 50 %, in the learned order
of channels, ShuffleNet's, a random one and the network's own: what is kept of the weights, and top-1 after
`--ablation-epochs` short epochs, from these weights and from random ones.

Top-1 on the 10,000 test images, one run each. Writes structured_resnet20_cifar10.json beside this file after each row,
and leaves out rows that are in it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.cifar_resnet import CPU, described, figures, opened, parser_of
from torch import nn

from tersenet.data.bundle import Data, Loader
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.graph.grouping import Grouping, group_convolutions, kernel_norms, mask_groups
from tersenet.graph.model import ModelGraph
from tersenet.group_learning.hooks import GroupLearning
from tersenet.measuring.macs import count_macs, params_of
from tersenet.methods.base import Context, Method, TrainingMethod
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.soft_filter_pruning import SoftFilterPruning
from tersenet.methods.structured_sparsification import StructuredSparsification
from tersenet.methods.train import Train
from tersenet.models.open import Source, example_of
from tersenet.ops.channel_order import Order
from tersenet.ops.group_levels import relationship_matrix
from tersenet.recipe_target import Target
from tersenet.train.evaluate import evaluate
from tersenet.train.hooks import Hooks
from tersenet.train.loop import fit
from tersenet.train.settings import Fit

RESULT = Path(__file__).with_suffix(".json")
SEED = 0
BATCH, BATCHES = 128, 50
"""Images of a batch, and batches of a short epoch."""
LR, SCRATCH_LR = 0.01, 0.1
STRENGTH = 7e-3
"""Of the regulariser: the paper's 2e-6 is meant for a hundred epochs at ten times the rate."""
LEFT = (0.5, 0.65)
"""Shares of the parameters that structured sparsification leaves."""
ORDERS = ("learned", "shufflenet", "random", "none")
Row = dict[str, Any]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, nargs=len(LEFT), default=[4, 1])
    parser.add_argument("--ablation-epochs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, data = opened("resnet20", options)
    whole = DataSettings(source=options.data, batch_size=BATCH, validation=0)
    data = load_data(whole, seed=SEED, normalise=data.normalise)
    claim = "ResNet-20 on CIFAR-10 with learned groups, at the MACs and at the parameters of filter pruning"
    passes = {"epochs_of_a_phase": options.epochs, "ablation_epochs": options.ablation_epochs}
    more = f" --epochs {options.epochs[0]} {options.epochs[1]} --ablation-epochs {options.ablation_epochs}"
    result: Row = described(claim, __file__, options, more)
    result |= passes | {"images_of_an_epoch": BATCH * BATCHES, "published": "260 epochs of 50,000 images"}
    result |= {"learning_rates": {"published weights": LR, "random": SCRATCH_LR}, "strength": STRENGTH}
    result |= {"seed": SEED, "start": costs_of(model) | figures(model, data), "rows": [], "ablation": []}
    if RESULT.is_file():
        known = json.loads(RESULT.read_text())
        if any(known[name] != value for name, value in passes.items()):
            raise SystemExit(f"{RESULT.name} holds rows of other passes: {passes}; move it away first")
        result |= {"rows": known["rows"], "ablation": known["ablation"]}
    bench = Bench(model, data, options, result)
    for left, epochs in zip(LEFT, options.epochs, strict=True):
        bench.compare(left, epochs)
    for start in ("published weights", "random"):
        bench.shuffle(start)


class Bench:
    """The rows, each done once."""

    def __init__(self, model: nn.Module, data: Data, options: argparse.Namespace, result: Row) -> None:
        self.model, self.data, self.options, self.result = model, data, options, result

    def compare(self, left: float, epochs: int) -> None:
        """All methods for one size, after as many epochs."""
        constant, cosine = self.phases(epochs)
        if left == LEFT[0]:
            control: list[Method] = [Train(fit=constant), Train(fit=cosine)]
            self.keep("rows", {"method": "control", "epochs": epochs}, partial(self.carried_out, control))
        row = {"method": "structured sparsification", "params_asked": left, "epochs": epochs}
        found = self.keep("rows", row, partial(self.structured, left, epochs))
        for cost in ("macs", "params"):
            target = Target(cost, float(found[cost]), relative=False)
            pruning = ChannelPruning(residual="independent")
            methods: dict[str, list[Method]] = {
                "SFP": [SoftFilterPruning(fit=constant), Train(fit=cosine)],
                "channel pruning": [pruning, Train(fit=constant), Train(fit=cosine)],
            }
            for name, steps in methods.items():
                row = {"method": name, "equal": cost, "params_asked": left, "epochs": epochs}
                self.keep("rows", row, partial(self.carried_out, steps, target))

    def shuffle(self, start: str) -> None:
        """The ablation: what an order is worth at the same groups, from these weights."""
        hooks = self.learning(copy.deepcopy(self.model), LEFT[0], self.options.epochs[0])
        learned = hooks.decide(rounds=50)
        random = np.random.default_rng(SEED)
        for name in ORDERS:
            groupings = {layer: Grouping(g.groups, ordered(name, g, random)) for layer, g in learned.items()}
            self.keep("ablation", {"order": name, "start": start}, partial(self.ablated, groupings, start))

    def phases(self, epochs: int) -> tuple[Fit, Fit]:
        constant = Fit(epochs=epochs, lr=LR, weight_decay=1e-4)
        return constant, Fit(epochs=epochs, lr=LR, weight_decay=1e-4, schedule="cosine")

    def keep(self, table: str, row: Row, make: Callable[[], Row]) -> Row:
        """The row as it is known, or made now and kept."""
        rows: list[Row] = self.result[table]
        for known in rows:
            if row.items() <= known.items():
                return known
        began = time.process_time()
        made: Row = row | make() | {"cpu_seconds": round(time.process_time() - began, 1)}
        rows.append(made)
        RESULT.write_text(json.dumps(self.result, indent=1) + "\n")
        print(json.dumps({key: value for key, value in made.items() if key != "curves"}), flush=True)
        return made

    def learning(self, model: nn.Module, left: float, epochs: int) -> GroupLearning:
        """The sparse phase for a share of the parameters."""
        graph = ModelGraph(model, example_of(model, batch=2))
        method = StructuredSparsification(
            fit=Fit(epochs=epochs, lr=LR, weight_decay=0, nesterov=False),
            strength=STRENGTH,
            warmup=0,
            first_rounds=20,
            rounds=10,
            trim=True,
        )
        context = Context(CPU, SEED, Target("params", left, relative=True), graph.macs(), graph.params(), self.data)
        return method.hooks(graph, context)

    def structured(self, left: float, epochs: int) -> Row:
        """Sparse, masked, grouped, fused and tuned network."""
        model = copy.deepcopy(self.model)
        hooks = self.learning(model, left, epochs)
        curve = self.train(model, hooks.settings.fit, hooks, phase=0)
        groupings = hooks.decide()
        stages = {"sparse": figures(model, self.data)}
        mask_groups(hooks.graph, groupings)
        stages["masked"] = figures(model, self.data)
        apart = hooks.graph.copy()
        differ = {"grouped": group_convolutions(apart, groupings, fuse=False).relative}
        stages["grouped"] = figures(apart.model, self.data)
        differ["fused"] = group_convolutions(hooks.graph, groupings).relative
        stages["fused"] = figures(model, self.data)
        curves = [curve, self.train(model, self.phases(epochs)[1], Hooks(), phase=1)]
        return {
            **self.outcome(model),
            "stages": stages,
            "relative_difference_to_masked": differ,
            "groups": {name: grouping.groups for name, grouping in groupings.items()},
            "curves": curves,
        }

    def carried_out(self, steps: list[Method], target: Target | None = None) -> Row:
        """The steps one after the other; `stages` is top-1 after each."""
        test = self.data.test
        assert test is not None
        model, curves, stages = copy.deepcopy(self.model), list[list[Row]](), dict[str, Row]()
        for number, step in enumerate(steps):
            graph = ModelGraph(model, example_of(model, batch=2))
            context = Context(CPU, SEED, target, graph.macs(), graph.params(), self.data)
            context.evaluate = lambda: evaluate(model, test, device=CPU)
            step.apply(graph, context)
            if isinstance(step, TrainingMethod):
                hooks = step.hooks(graph, context)
                curves.append(self.train(model, step.fit, hooks, phase=len(curves)))
                step.finish(graph, context, hooks)
            stages[f"{number} {step.method}"] = figures(model, self.data)
        return {**self.outcome(model), "stages": stages, "curves": curves}

    def ablated(self, groupings: Mapping[str, Grouping], start: str) -> Row:
        """Cut to these groups, and trained."""
        torch.manual_seed(SEED)
        fresh = start == "random"
        network = Source("resnet20").open(self.data.shape, self.data.classes) if fresh else self.model
        model = copy.deepcopy(network)
        graph = ModelGraph(model, example_of(model, batch=2))
        row: Row = {} if fresh else {"kept": kept(model, groupings)}
        mask_groups(graph, groupings)
        group_convolutions(graph, groupings)
        row["cut"] = figures(model, self.data)
        settings = self.phases(self.options.ablation_epochs)[1].model_copy(update={"lr": SCRATCH_LR if fresh else LR})
        curve = self.train(model, settings, Hooks(), phase=0)
        return {**self.outcome(model), **row, "curves": [curve]}

    def outcome(self, model: nn.Module) -> Row:
        return costs_of(model) | figures(model, self.data)

    def train(self, model: nn.Module, settings: Fit, hooks: Hooks, phase: int) -> list[Row]:
        """One phase, on images of its own."""
        assert self.data.train is not None
        part = dataclasses.replace(self.data, train=Parts(self.data.train, phase * settings.epochs), validation=None)
        return fit(model, part, settings, seed=SEED, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)


class Parts:
    """Short epochs of BATCHES batches, one behind the other in those of the whole training set."""

    def __init__(self, whole: Loader, first: int) -> None:
        self.whole, self.first, self.n = whole, first, BATCHES * BATCH

    def __len__(self) -> int:
        return BATCHES

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        number, part = divmod(self.first + epoch, len(self.whole) // BATCHES)
        return itertools.islice(self.whole.batches(number), part * BATCHES, (part + 1) * BATCHES)


def costs_of(model: nn.Module) -> Row:
    return {"macs": count_macs(model, example_of(model))[0], "params": params_of(model)}


def ordered(name: str, grouping: Grouping, random: np.random.Generator) -> Order:
    """The order of one layer's channels. ShuffleNet's groups write their channels one after the other, and read every
    so many-th."""
    C_out, C_in = len(grouping.order.rows), len(grouping.order.columns)
    if name == "learned":
        return grouping.order
    if name == "random":
        return Order(random.permutation(C_out), random.permutation(C_in))
    if name == "shufflenet":
        return Order(np.arange(C_out), np.arange(C_in).reshape(-1, grouping.groups).T.ravel())
    return Order.identity(C_out, C_in)


def kept(model: nn.Module, groupings: Mapping[str, Grouping]) -> Row:
    """Shares of the grouped layers' weights that lie inside the groups: the mean over layers of the l1 norm and of the
    squared l2 norm, and the share of the weights themselves."""
    shares: dict[str, list[float]] = {"l1": [], "energy": [], "weights": []}
    for name, grouping in groupings.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        inside = grouping.order.back(relationship_matrix(weight.shape[0], weight.shape[1], grouping.groups))
        energy = weight.double().square().sum((2, 3)).numpy()
        for what, S in (("l1", kernel_norms(weight)), ("energy", energy), ("weights", np.ones(inside.shape))):
            shares[what].append(float(S[inside].sum() / S.sum()))
    return {what: float(np.mean(values)) for what, values in shares.items()}


if __name__ == "__main__":
    main()
