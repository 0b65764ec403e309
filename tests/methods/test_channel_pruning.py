"""The `channel_pruning` method on small networks: acceptance facts of its specification, refusals, recipes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sfp_support import CLASSES, CPU, SHAPE, Batches, tiny_data
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet as tn
from graph_support import compare_on, randomise
from tersenet.calibration.images import Images
from tersenet.calibration.items import Costs, find_items
from tersenet.calibration.readers import find_readers
from tersenet.calibration.refit import contribution, curve
from tersenet.calibration.sampling import Targets, statistics
from tersenet.calibration.solver import Solver
from tersenet.data.bundle import Data
from tersenet.data.load import load_data
from tersenet.data.registry import DataSettings
from tersenet.errors import GraphError, TersenetError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import attach
from tersenet.measuring.macs import count_macs
from tersenet.methods.base import Context
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.models.open import Source, example_of
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.nn.adapter import ChannelAdapter
from tersenet.ops.gram import StatisticsError
from tersenet.progress import Progress
from tersenet.recipe import load_recipe
from tersenet.recipe_target import Target
from tersenet.results import Accuracy
from tersenet.train.evaluate import evaluate
from tersenet.train.recalibrate import recalibrate_bn
from zoo_support import needs

EXAMPLE = (torch.zeros(2, *SHAPE),)


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(resnet_cifar(8, width=10, classes=CLASSES))


def layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def data(n: int = 96) -> Data:
    return dataclasses.replace(tiny_data(), train=Batches(n, 32, 1))


def context_of(graph: ModelGraph, target: str | None = None, **more: Any) -> Context:
    more.setdefault("data", data())
    wanted = Target.parse(target) if target else None
    return Context(CPU, 0, wanted, graph.macs(), graph.params(), **more)


def prune(model: nn.Module, target: str | None = None, **settings: Any) -> Context:
    graph = ModelGraph(model, EXAMPLE)
    context = context_of(graph, target)
    ChannelPruning.model_validate({"images": 96} | settings).apply(graph, context)
    return context


def solver_of(model: nn.Module, n: int = 96, loader: Any = None) -> Solver:
    images = Images(loader or Batches(n, 32, 1), n, 16, 0, CPU)
    return Solver(ModelGraph(model.eval(), EXAMPLE), images, "lasso", reconstruct=True)


def output_error(model: nn.Module, pruned: nn.Module) -> float:
    x = Batches(64, 32, 5).x
    with torch.no_grad():
        return float((pruned(x) - model(x)).square().mean().sqrt() / model(x).std(0).norm())


def test_reconstruction_and_the_lasso_each_lower_the_error() -> None:
    whole = resnet()
    errors: dict[str, float] = {}
    variants: dict[str, dict[str, Any]] = {
        "lasso": {},
        "first": {"select": "first"},
        "random": {"select": "random"},
        "weights": {"select": "max_response"},
        "not fitted": {"reconstruct": False},
    }
    for name, settings in variants.items():
        model = resnet()
        prune(model, rate=0.3, **settings)
        errors[name] = output_error(whole, model)
    assert errors["lasso"] < 0.6 * errors["not fitted"]
    assert errors["lasso"] < min(errors["first"], errors["random"])


def test_fact_6_fitting_an_untouched_network_changes_nothing() -> None:
    model = resnet()
    before = copy.deepcopy(model)
    solver = solver_of(model)
    readers, _ = find_readers(solver.graph)
    known = solver.statistics(readers)
    for reader in readers:
        solver.fit(reader, known[reader.end])
    assert compare_on(before, model, (torch.randn(4, *SHAPE),)) < 1e-4


class Chain(nn.Module):
    """Two convolutions with biases; channel 1 of the first is dead, 4 is a copy of 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, CLASSES)
        with torch.no_grad():
            for tensor in self.first.parameters():
                tensor[1] = -1.0 if tensor.dim() == 1 else 0.0
                tensor[4] = tensor[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))).mean((2, 3)))


def test_fact_7_dead_and_copied_channels_go_first_and_cost_nothing() -> None:
    whole, model = Chain().eval(), Chain().eval()
    prune(model, rates={"first": 0.4}, include=("first",), positions=64)
    assert model.first.out_channels == 4
    kept = [next(i for i in range(6) if torch.equal(w, whole.first.weight[i])) for w in model.first.weight]
    assert 1 not in kept
    assert len({2, 4} & set(kept)) == 1
    assert compare_on(whole, model, (torch.randn(4, *SHAPE),)) < 1e-4


def test_fact_9_the_fitted_bias_is_the_whole_bias() -> None:
    """A constant added to the bias of a fitted layer comes out at the end: the published code loses it."""
    plain, shifted = Chain().eval(), Chain().eval()
    with torch.no_grad():
        shifted.get_parameter("second.bias").add_(3.0)
    for model in (plain, shifted):
        prune(model, rates={"first": 0.5}, include=("first",))
    bias = plain.get_parameter("second.bias")
    torch.testing.assert_close(shifted.get_parameter("second.bias"), bias + 3.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(shifted.second.weight, plain.second.weight, rtol=0, atol=1e-4)


class Tokens(nn.Module):
    """Linear layers on the places of an image; the first reads a view, and its bias is added behind the product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 8), nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.first.bias.add_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.second(F.relu(self.first(x))).mean(1)


def test_the_bias_is_whole_where_it_is_added_behind_the_product() -> None:
    whole, model = Tokens().eval(), Tokens().eval()
    prune(model, rates={"conv": 0.2}, include=("conv",))
    assert model.first.in_features == 5
    x = Batches(96, 96, 1).x
    with torch.no_grad():
        outputs = [n.first(F.relu(n.conv(x)).flatten(2).transpose(1, 2)).mean((0, 1)) for n in (whole, model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.05)


class Normed(nn.Module):
    """A norm over channels between two convolutions: what it gives depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.LayerNorm(12), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def responses(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.responses(x)).mean((2, 3)))


@pytest.mark.parametrize("select", ["lasso", "first"])
def test_behind_a_norm_over_channels_the_fit_is_to_what_the_small_network_gives(select: str) -> None:
    """On the images and places that it was fitted on, least squares leave a residual without a mean and uncorrelated
    with the fit."""
    whole, model = Normed().eval(), Normed().eval()
    prune(model, rates={"first": 0.5}, include=("first",), positions=64, select=select)
    x = Batches(96, 96, 1).x
    with torch.no_grad():
        fitted, missed = model.responses(x), whole.responses(x) - model.responses(x)
    assert float(missed.mean((0, 2, 3)).abs().max()) < 1e-3 * float(fitted.std())
    centred = fitted - fitted.mean((0, 2, 3), keepdim=True)
    assert float((missed * centred).mean((0, 2, 3)).abs().max()) < 1e-3 * float(fitted.var())


class Joined(nn.Module):
    """Two layers read `first`: one alone, one beside the much stronger `other`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.alone, self.beside = nn.Conv2d(6, 5, 1), nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(10, CLASSES)
        with torch.no_grad():
            self.other.weight *= 100
            # Alone needs channels 0 to 2, and what is beside the other 3 to 5.
            self.alone.weight[:, 3:] *= 0.1
            self.beside.weight[:, :3] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        both = torch.cat([first, F.relu(self.other(x))], 1)
        return self.head(torch.cat([self.alone(first), self.beside(both)], 1).mean((2, 3)))


def test_layers_count_by_the_share_of_their_outputs_that_channels_explain() -> None:
    whole, model = Joined().eval(), Joined().eval()
    prune(model, rates={"first": 0.5}, include=("first",), positions=64)
    kept = [next(i for i in range(6) if torch.equal(w, whole.first.weight[i])) for w in model.first.weight]
    assert kept == [0, 1, 2]


def test_what_is_gone_explains_nothing_when_the_next_is_chosen() -> None:
    """Moments from before a removal give the same contributions as new ones."""
    solver = solver_of(Joined().eval())
    items = {i.name: i for i in find_items(solver.graph, ("first", "other"), (), sample=False).all}
    beside = next(r for r in items["other"].readers if r.layer == "beside")
    solver._targets = Targets(solver.graph, [beside], solver.images)  # pyright: ignore[reportPrivateUsage]
    before = solver.statistics([beside])[beside.end]
    solver.remove(items["first"], torch.arange(2))
    after = solver.statistics([beside])[beside.end]
    old, new = (contribution(solver.graph, beside, s, items["other"].units, solver.gone) for s in (before, after))
    torch.testing.assert_close(old.gram, new.gram, rtol=1e-5, atol=0)
    torch.testing.assert_close(old.target, new.target, rtol=1e-5, atol=0)


def test_rows_are_counted_by_the_places_that_there_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 6), nn.Flatten(), nn.Linear(8, CLASSES))
    for images, enough in ((4 * 144 - 1, False), (4 * 144, True)):
        solver = solver_of(model, images)
        last = next(r for r in find_readers(solver.graph)[0] if r.layer == "2")
        assert solver.determined(last) is enough


def test_with_few_rows_a_pull_to_the_old_weights_keeps_images_that_were_not_seen(monkeypatch: Any) -> None:
    errors: list[float] = []
    for pull in (None, 0.0):
        if pull is not None:
            monkeypatch.setattr("tersenet.calibration.refit._PULL", pull)
        model = resnet()
        prune(model, rate=0.3, images=24)
        errors.append(output_error(resnet(), model))
    assert errors[0] < 0.8 * errors[1]


def test_random_choices_differ_between_layers_and_not_between_runs() -> None:
    solver = solver_of(resnet())
    solver.selection = "random"
    items = [i for i in find_items(solver.graph, ("*",), (), sample=True).all if i.size == 20]
    orders = [tuple(solver.choice(item, {}).order.tolist()) for item in items]
    assert len(set(orders)) == len(items) > 1
    assert orders == [tuple(solver.choice(item, {}).order.tolist()) for item in items]


class Block(nn.Module):
    """A residual block behind a stem whose damage only the branch's last layer can make up for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def block(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.bn(self.conv2(F.relu(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.block(x)).mean((2, 3)))


def test_fact_17_a_branch_makes_up_for_what_its_shortcut_has_lost() -> None:
    errors: dict[bool, float] = {}
    x = Batches(64, 32, 5).x
    for corrected in (True, False):
        model: Any = randomise(Block())
        wanted = model.block(x).detach()
        solver = solver_of(model)
        readers, _ = find_readers(solver.graph)
        conv2 = next(r for r in readers if r.layer == "conv2")
        assert conv2.sum is not None
        assert conv2.norm is not None
        conv2 = conv2 if corrected else dataclasses.replace(conv2, sum=None)
        solver._targets = Targets(solver.graph, [conv2], solver.images)  # pyright: ignore[reportPrivateUsage]
        with torch.no_grad():
            model.stem.weight[2:4] *= 0.5
        solver.fit(conv2, solver.statistics([conv2])[conv2.end])
        errors[corrected] = float((model.block(x).detach() - wanted).square().mean())
    assert errors[True] < 0.9 * errors[False]


def test_fact_17_equal_shortcuts_leave_the_targets_as_they_are() -> None:
    solver = solver_of(randomise(Block()))
    readers, _ = find_readers(solver.graph)
    conv2 = next(r for r in readers if r.layer == "conv2")
    moments: list[Any] = []
    for reader in (conv2, dataclasses.replace(conv2, sum=None)):
        targets = Targets(solver.graph, [reader], solver.images)
        moments.append(statistics(solver.graph, targets, [reader], solver.images, solver.gone)[reader.end][0])
    assert torch.equal(moments[0].xy, moments[1].xy)
    assert torch.equal(moments[0].yy, moments[1].yy)


def test_fact_18_batch_norm_scales_of_zero_do_no_harm() -> None:
    model = resnet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[:2] = 0
    whole = copy.deepcopy(model)
    prune(model, rate=0.3)
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    assert output_error(whole, model) < 1.0


def test_training_statistics_are_those_that_were_stored() -> None:
    """After a fit, batch norm holds the statistics of the new outputs: a batch gives the same."""
    model = resnet()
    prune(model, rate=0.3, positions=64)
    x = Batches(96, 96, 1).x
    stored = layer(model, "layer1.0.bn2").running_var.clone()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x)
    inner = layer(model, "layer1.0.bn2")
    torch.testing.assert_close(inner.running_var, stored, rtol=0.25, atol=1e-3)


def test_fact_5_two_runs_are_the_same_to_the_bit() -> None:
    models = [resnet(), resnet()]
    for model in models:
        torch.manual_seed(int(torch.randint(1000, (1,))))
        prune(model, "macs=60%")
    states = [m.state_dict() for m in models]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize("residual", ["coupled", "independent"])
@pytest.mark.parametrize("allocate", ["measured", "uniform"])
@pytest.mark.parametrize("target", ["macs=60%", "params=50%"])
def test_fact_19_a_target_is_met_and_used(target: str, allocate: str, residual: str) -> None:
    model = resnet()
    graph = ModelGraph(model, EXAMPLE)
    wanted = Target.parse(target)
    whole = graph.macs() if wanted.kind == "macs" else graph.params()
    prune(model, target, allocate=allocate, residual=residual)
    after = ModelGraph(model, EXAMPLE)
    used = (after.macs() if wanted.kind == "macs" else after.params()) / wanted.limit(whole)
    assert 0.99 <= used <= 1


def test_the_curve_of_a_layer_with_few_rows_is_that_of_its_fits() -> None:
    """Without the ridge, 48 rows would be met exactly by 48 of 80 inputs: the rest would seem to be worth nothing."""
    torch.manual_seed(0)
    head = nn.Linear(80, CLASSES)
    model = nn.Sequential(nn.Conv2d(3, 80, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    solver = solver_of(model, 48)
    (item,) = find_items(solver.graph, ("*",), (), sample=False).all
    known = solver.statistics(item.readers)
    choice = solver.choice(item, known)
    (reader,) = item.readers
    found = curve(solver.graph, reader, known[reader.end], item.units, choice.order, solver.gone)
    assert bool((found[1:] <= found[:-1] + 1e-12).all())
    assert found[-1] < 1e-6 < 1e-4 < found[60]
    for count in (10, 40, 60):
        with solver.trial([item]):
            solver.remove(item, choice.order[:count].sort().values)
            error, _ = solver.fit(reader, known[reader.end])
        assert float(found[count]) == pytest.approx(error, rel=1e-6)


class Looped(nn.Module):
    """A layer that reads the trunk and writes into it: it loses outputs with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.block, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.block(x)).mean((2, 3)))


@pytest.mark.parametrize("allocate", ["measured", "uniform"])
def test_a_layer_that_writes_what_it_reads_is_fitted_to_what_is_left_of_both(allocate: str) -> None:
    model = randomise(Looped())
    whole = copy.deepcopy(model)
    context = prune(model, "macs=60%", allocate=allocate, positions=64)
    assert layer(model, "block").in_channels == layer(model, "block").out_channels < 12
    fits = {fit.name: fit for fit in context.fits}
    assert (fits["block"].error or 1.0) < (fits["block"].unfitted or 0.0)
    assert output_error(whole, model) < 1.0


def test_fact_19_multiples_and_bounds() -> None:
    model = resnet()
    prune(model, "macs=60%", multiple=4, at_least=4)
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"):
        count = layer(model, name).out_channels
        assert count % 4 == 0 or count == layer(resnet(), name).out_channels


def test_samplers_leave_the_trunk_whole() -> None:
    model = resnet()
    context = prune(model, residual="independent", rate=0.4)
    assert layer(model, "conv1").out_channels == 10
    sampled = layer(model, "layer2.0.conv1")
    assert isinstance(sampled, ChannelAdapter)
    assert sampled.inner.in_channels == 6
    fits = {fit.name: (fit.before, fit.after) for fit in context.fits}
    assert fits["layer2.0.conv1"] == (10, 6)
    model = resnet()
    prune(model, residual="independent", rates={"input:layer2*": 0.5}, rate=0.0)
    assert layer(model, "layer2.0.conv1").inner.in_channels == 5
    assert layer(model, "layer1.0.conv1").in_channels == 10


def test_fact_17_a_sampler_leaves_what_it_reads_as_it_was() -> None:
    whole, model = resnet(), resnet()
    prune(model, residual="independent", rates={"input:layer1.0.conv1": 0.5}, rate=0.0)
    seen: list[Tensor] = []
    for network in (whole, model):
        network.get_submodule("layer1.0").register_forward_hook(lambda _m, args, _out: seen.append(args[0].clone()))
        network(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(seen[0], seen[1])


def test_facts_11_and_23_with_samplers_cut_saved_loaded_and_exported_it_is_the_same(tmp_path: Path) -> None:
    """Cut, it is the masked network. Others, with pools and depthwise layers, are in the contract of all methods."""
    model = Source("resnet8", arguments=(("width", 10),)).open(SHAPE, CLASSES)
    randomise(model)
    masked: list[nn.Module] = []

    def evaluate() -> Accuracy:
        masked.append(copy.deepcopy(model))
        return Accuracy(n=0)

    graph = ModelGraph(model, EXAMPLE)
    attach(model, graph.record)
    ChannelPruning(images=96, rate=0.4, residual="independent").apply(graph, context_of(graph, evaluate=evaluate))
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert any(isinstance(m, ChannelAdapter) for m in model.modules())
    assert compare_on(masked[-1], model, (x,)) < 1e-5
    loaded = tn.load(tn.save(model, tmp_path / "saved"))
    tn.export(loaded, tmp_path / "net.pt2", x)
    exported = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-5)


def test_costs_are_the_graphs() -> None:
    graph = ModelGraph(resnet(), EXAMPLE)
    items = find_items(graph, ("*",), (), sample=False).all
    random = np.random.default_rng(0)
    for kind, count in (("macs", graph.macs), ("params", graph.params)):
        costs = Costs(graph, items, kind)
        for _ in range(10):
            left = np.array([random.integers(1, item.size + 1) for item in items])
            kept = {i.group.name: np.arange(n) for i, n in zip(items, left, strict=True) if i.group}
            assert costs(left) == count(kept)


def test_notes_say_what_was_done() -> None:
    notes = prune(resnet(), rate=0.3, images=2).notes
    assert any("calibrated on 2 training images (seed 0)" in note for note in notes)
    assert any("At least" in note and "rows are needed" in note for note in notes)


def test_every_fitted_layer_is_reported_with_its_errors() -> None:
    context = prune(resnet(), rate=0.3)
    fits = {fit.name: fit for fit in context.fits}
    assert (fits["layer2.0.conv2"].before, fits["layer2.0.conv2"].after) == (20, 14)
    assert list(fits) == [fit.name for fit in context.fits]
    for fit in context.fits:
        assert fit.error is not None
        assert fit.unfitted is not None
        assert 0 < fit.error < fit.unfitted
        assert fit.output_error is not None
    untouched = prune(resnet(), rate=0.3, reconstruct=False)
    assert all(fit.error is None for fit in untouched.fits)
    assert untouched.fits


class Interrupted(Exception):
    pass


class Stopping(Progress):
    """A process that dies when it wants to keep its part number `left`, counted from 0."""

    left = 0

    def put(self, name: str, value: Any) -> None:
        if not self.left:
            raise Interrupted
        self.left -= 1
        super().put(name, value)


@pytest.mark.parametrize(("target", "stop"), [(None, 4), ("macs=60%", 2), ("macs=60%", 8)])
def test_an_interrupted_step_goes_on_behind_the_last_layer(target: str | None, stop: int, tmp_path: Path) -> None:
    rate = None if target else 0.3
    whole, model = resnet(), resnet()
    prune(whole, target, rate=rate)
    graph = ModelGraph(model, EXAMPLE)
    method, stopping = ChannelPruning(images=96, rate=rate), Stopping(tmp_path)
    stopping.left = stop
    with pytest.raises(Interrupted):
        method.apply(graph, context_of(graph, target, progress=stopping))
    assert len(list(tmp_path.glob("*.pt"))) == stop
    assert compare_on(resnet(), model, (torch.randn(4, *SHAPE),)) == 0
    context = context_of(graph, target, progress=Progress(tmp_path))
    method.apply(graph, context)
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(context.fits) >= 6


def test_an_interrupted_run_goes_on_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    def compress(name: str) -> dict[str, Tensor]:
        overrides = {"steps.0.images": 64, "steps.0.positions": 8}
        compressed = tn.compress(
            "resnet8", "channel_pruning", target="macs=60%", data="digits", out=tmp_path / name, overrides=overrides
        )
        assert len(compressed.report.steps[0].fits) > 3
        return compressed.model.state_dict()

    whole = compress("whole")
    keep, count = Progress.put, 0

    def stops(self: Progress, name: str, value: Any) -> None:
        nonlocal count
        keep(self, name, value)
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "put", stops)
        with pytest.raises(KeyboardInterrupt):
            compress("stopped")
    parts = tmp_path / "stopped" / "steps" / "00-channel_pruning" / "progress"
    assert len(list(parts.glob("*.pt"))) == 5
    for name, tensor in compress("stopped").items():
        assert torch.equal(tensor, whole[name])
    assert not parts.exists()


def test_a_failure_behind_the_first_cut_leaves_the_network_as_it_was(monkeypatch: Any) -> None:
    import tersenet.calibration.cut as cut

    model = resnet()
    graph = ModelGraph(model, EXAMPLE)
    before, record = copy.deepcopy(model), graph.record
    real, edits = cut.compare, list[int]()

    def differs(*networks: Any) -> Any:
        edits.append(len(graph.record.edits))
        return real(*networks).model_copy(update={"relative": 1.0})

    monkeypatch.setattr(cut, "compare", differs)
    with pytest.raises(GraphError, match="sampled inputs"):
        ChannelPruning(images=96, rate=0.3, residual="independent").apply(graph, context_of(graph))
    assert edits[0] > 2
    assert graph.record == record
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in before.named_parameters()
    }
    assert compare_on(before, model, (torch.randn(4, *SHAPE),)) == 0
    # The graph is usable again too.
    ChannelPruning(images=96, rate=0.3).apply(graph, context_of(graph))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TersenetError, "channel_pruning needs a rate .* or a target"),
        ({"rate": 0.3}, TersenetError, "calibrates on training images"),
        ({"rate": 0.3, "include": ("layer9*",)}, UnknownNameError, "unknown layer 'layer9"),
        ({"rate": 0.3, "rates": {"fc": 0.1}}, UnknownNameError, "unknown layer 'fc'"),
        ({"rate": 0.3, "exclude": ("type:conv",)}, GraphError, "no layer is left to prune"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = resnet()
    graph = ModelGraph(model, EXAMPLE)
    with pytest.raises(error, match=message):
        ChannelPruning(**settings).apply(graph, context_of(graph, data=None))
    assert graph.record.edits == ()


@pytest.mark.parametrize("allocate", ["measured", "uniform"])
def test_a_target_out_of_reach_says_the_floor(allocate: str) -> None:
    with pytest.raises(
        TersenetError, match=r"can't be met: with the selected layers at their smallest [\d,]+ are left"
    ):
        prune(resnet(), "macs=40%", at_least=9, allocate=allocate)


def test_bad_activations_name_the_layer_and_change_nothing() -> None:
    model = resnet()
    model.get_parameter("layer2.0.conv1.weight").data[3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StatisticsError, match=r"layer2\.0\.conv1"):
        prune(model, rate=0.3)
    assert all(torch.equal(a.nan_to_num(), before[n].nan_to_num()) for n, a in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"rate": 1.0}, {"select": "l1"}, {"target": "macs=150%"}, {"images": 0}])
def test_settings_that_a_recipe_check_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChannelPruning(**settings)


def test_a_dry_run_needs_no_data() -> None:
    for residual in ("coupled", "independent"):
        steps = [{"method": "channel_pruning", "residual": residual}]
        report = tn.compress("resnet8", {"steps": steps}, target="macs=60%", dry_run=True).report
        assert 0.58 < report.after.macs / report.before.macs <= 0.6
        assert any("shared out evenly here" in note for note in report.steps[0].notes)


@pytest.mark.parametrize("recipe", ["channel_pruning_finetune", "channel_pruning"])
def test_shipped_recipes(recipe: str) -> None:
    overrides: dict[str, Any] = {"steps.0.images": 64}
    if recipe == "channel_pruning_finetune":
        overrides["steps.1.fit.epochs"] = 1
    report = tn.compress("resnet8", recipe, target="macs=60%", data="digits", overrides=overrides, device="cpu").report
    assert 0.59 <= report.after.macs / report.before.macs <= 0.6


PUBLISHED = {
    "5x": ((24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512), 3_391_649_856),
    "4x": ((12, 64, 21, 128, 73, 58, 256, 121, 166, 512, 512, 512, 512), 3_967_828_704),
    "2x": ((11, 64, 55, 128, 148, 104, 256, 221, 421, 512, 512, 512, 512), 7_209_432_720),
}


def vgg_macs(widths: tuple[int, ...]) -> int:
    """Of the convolutions alone, as networks are counted here."""
    layers: list[nn.Module] = []
    wide = 3
    for place, width in enumerate(widths):
        layers.append(nn.Conv2d(wide, width, 3, padding=1))
        wide = width
        if place in (1, 3, 6, 9):
            layers.append(nn.MaxPool2d(2))
    with torch.device("meta"):
        model = nn.Sequential(*layers).to("meta")
        return count_macs(model, (torch.zeros(1, 3, 224, 224),))[0]


def test_fact_12_published_widths_of_vgg16_and_their_macs() -> None:
    sizes = (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6
    assert vgg_macs(sizes) == 15_346_630_656
    for name, (widths, macs) in PUBLISHED.items():
        assert vgg_macs(widths) == macs
        step = load_recipe(f"channel_pruning_vgg16_{name}").steps[0]
        assert isinstance(step, ChannelPruning)
        counts = [size - int(size * rate + 1e-9) for size, rate in zip(sizes, step.rates.values(), strict=True)]
        assert tuple(counts) == widths


def test_fact_12_the_published_resnet50_widths() -> None:
    """Of the convolutions alone, with the stride in each block's first one, as the published network has it."""
    rates = {name: rate for step in load_recipe("channel_pruning_resnet50").steps[:1] for name, rate in _rates(step)}

    def macs(pruned: bool) -> int:
        def left(name: str, size: int) -> int:
            return size - int(size * rates.get(name, 0.0) + 1e-9) if pruned else size

        total, trunk, side = 64 * 3 * 49 * 112 * 112, 64, 56
        for stage, blocks in enumerate((3, 4, 6, 3), 1):
            inner = 32 * 2**stage
            for block in range(blocks):
                name = f"layer{stage}.{block}"
                side = side // 2 if block == 0 and stage > 1 else side
                # The first sampler, of what no block has made, is in the published widths and not in the recipe.
                read = 35 if pruned and trunk == 64 else left(f"input:{name}.conv1", trunk)
                a, b = left(f"{name}.conv1", inner), left(f"{name}.conv2", inner)
                shortcut = trunk * 4 * inner if block == 0 else 0
                total += side * side * (read * a + 9 * a * b + b * 4 * inner + shortcut)
                trunk = 4 * inner
        return total

    assert macs(pruned=False) == 3_855_925_248
    assert macs(pruned=True) == 2_597_272_244


def _rates(step: Any) -> list[tuple[str, float]]:
    assert isinstance(step, ChannelPruning)
    return list(step.rates.items())


@pytest.mark.slow
@needs("timm", "torchvision")
def test_the_preset_of_xception_leaves_the_trunk_whole_and_halves_the_macs() -> None:
    report = tn.compress(None, "channel_pruning_xception", dry_run=True).report
    assert 0.495 < report.after.macs / report.before.macs <= 0.5
    rows = {row.name: row for row in report.layers}
    inner, depthwise = rows["block5.rep.1.pointwise"], rows["block5.rep.4.conv1"]
    assert inner.out_after == depthwise.out_after < inner.out_before == 728
    assert rows["block5.rep.7.pointwise"].out_after == rows["block12.skip"].in_after == 728


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(1800)
def test_fact_22_half_of_resnet56_is_left_with_little_loss(test_data: Path, cifar10_folder: Path) -> None:
    source = Source("resnet56", str(test_data / "weights" / "resnet56-4bfd9763.th"))
    settings = DataSettings(source=f"cifar10:{cifar10_folder}", batch_size=128)
    images = load_data(settings, seed=0, normalise=source.normalise)
    whole = source.open(images.shape, images.classes, images.normalise)

    def top1(model: nn.Module) -> float:
        assert images.test is not None
        return evaluate(model, images.test, device=CPU).top1 or 0.0

    def pruned(**settings: Any) -> nn.Module:
        graph = ModelGraph(copy.deepcopy(whole), example_of(whole, batch=2))
        macs = graph.macs()
        context = Context(CPU, 0, Target.parse("macs=50%"), macs, graph.params(), images)
        ChannelPruning(residual="independent", **settings).apply(graph, context)
        assert 0.495 < ModelGraph(graph.model, graph.example).macs() / macs <= 0.5
        return graph.model

    assert top1(pruned()) > top1(whole) - 0.025
    fitted, bare = (pruned(allocate="uniform", images=500, reconstruct=fit) for fit in (True, False))
    assert images.train is not None
    recalibrate_bn(bare, images.train, 8, device=CPU)
    assert top1(fitted) > top1(bare) + 0.05


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not torch.cuda.is_available(), reason="half an hour on a CPU: benchmarks have it")
def test_fact_22_three_epochs_leave_a_loss_of_one_point_at_most(
    tmp_path: Path, test_data: Path, cifar10_folder: Path
) -> None:
    weights = test_data / "weights" / "resnet56-4bfd9763.th"
    recipe, data = "channel_pruning_resnet56_cifar10", f"cifar10:{cifar10_folder}"
    report = tn.compress("resnet56", recipe, data=data, weights=weights, out=tmp_path / "run").report
    assert report.before.top1 is not None
    assert report.after.top1 is not None
    assert report.after.top1 >= report.before.top1 - 0.01


@pytest.mark.slow
@pytest.mark.data
def test_fitting_is_worth_a_lot_on_real_images(test_data: Path, cifar10_folder: Path) -> None:
    source = Source("resnet20", str(test_data / "weights" / "resnet20-12fca82f.th"))
    settings = DataSettings(source=f"cifar10:{cifar10_folder}", batch_size=128)
    images = load_data(settings, seed=0, normalise=source.normalise)
    top1: dict[bool, float] = {}
    for reconstruct in (True, False):
        model = source.open(images.shape, images.classes, images.normalise)
        graph = ModelGraph(model, example_of(model, batch=2))
        context = Context(CPU, 0, Target.parse("macs=70%"), graph.macs(), graph.params(), images)
        ChannelPruning(images=500, allocate="uniform", reconstruct=reconstruct).apply(graph, context)
        assert images.test is not None
        top1[reconstruct] = evaluate(model, images.test, device=CPU).top1 or 0.0
    assert top1[True] > top1[False] + 0.05
