"""The `magnitude` method on small networks, through its settings; its parts have tests of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sfp_support import CLASSES, CPU, SHAPE, tiny_data
from torch import nn

import tersenet as tn
from graph_support import compare_on, randomise, reference
from tersenet.errors import GraphError, TersenetError, UnknownNameError
from tersenet.graph.compact import silence
from tersenet.graph.model import ModelGraph
from tersenet.measuring.macs import count_macs
from tersenet.methods.base import Context
from tersenet.methods.magnitude import Magnitude
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.nn.adapter import ChannelAdapter
from tersenet.recipe_target import Target

EXAMPLE = (torch.zeros(2, *SHAPE),)
SCORES = ["l1", "l2", "fpgm", "bn_scale", "taylor", "activation", "apoz", "random"]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise(resnet_cifar(8, width=10, classes=CLASSES))


def context_of(graph: ModelGraph, **more: Any) -> Context:
    more.setdefault("data", tiny_data())
    return Context(device=CPU, seed=3, original_macs=graph.macs(), original_params=graph.params(), **more)


def prune(model: nn.Module, goal: str | None = None, /, **settings: Any) -> Context:
    graph = ModelGraph(model, EXAMPLE)
    context = context_of(graph, target=Target.parse(goal) if goal else None)
    Magnitude(**settings).apply(graph, context)
    return context


def widths(model: nn.Module) -> dict[str, int]:
    """Filters of every convolution, inside an adapter or not."""
    return {name.removesuffix(".inner"): len(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_meets_a_target_and_repeats_itself(score: str, scope: str) -> None:
    models = [resnet(), resnet()]
    for model in models:
        context = prune(model, "macs=50%", score=score, scope=scope)
        assert context.equality is not None
        assert context.equality.relative <= context.equality.tolerance
    macs = [count_macs(model, EXAMPLE)[0] for model in (resnet(), *models)]
    assert 0.48 * macs[0] < macs[1] <= 0.5 * macs[0]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    images = [note for note in context.notes if "32 training images" in note]
    assert bool(images) == (score in ("taylor", "activation", "apoz"))


@pytest.mark.parametrize("constants", ["exact", "zero"])
def test_the_compact_network_is_the_masked_one(constants: str) -> None:
    model = resnet().double()
    graph = ModelGraph(model, (EXAMPLE[0].double(),))
    context = context_of(graph)
    settings = Magnitude.model_validate({"rate": 0.4, "constants": constants})
    groups = [g for g in graph.groups if g.frozen is None]
    kept = settings._kept(graph, groups, context)
    masked = reference(graph, kept)
    if constants == "zero":
        silent = ModelGraph(masked, graph.example)
        for group in groups:
            silence(silent, group, graph.removed(kept))
    settings.apply(graph, context)
    assert compare_on(masked, model, (torch.randn(3, *SHAPE, dtype=torch.float64),)) < 1e-10
    assert (constants == "zero") != any(isinstance(m, ChannelAdapter) for m in model.modules())


def test_nothing_removed_is_bit_exact() -> None:
    model = resnet()
    prune(model, rate=0.0)
    prune(model, "macs=100%")
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (resnet(), model)), strict=True))


def test_the_weakest_filters_go() -> None:
    model = resnet()
    weight = model.get_parameter("layer1.0.conv1.weight")
    weight.data[[1, 4, 6]] *= 1e-3
    kept = weight.data[[0, 2, 3, 5, 7, 8, 9]].clone()
    prune(model, rate=0.3, include=("layer1.0.conv1",))
    assert torch.equal(model.get_parameter("layer1.0.conv1.weight"), kept)


def test_rates_patterns_and_bounds() -> None:
    model = resnet()
    before = widths(model)
    prune(model, rates={"layer1*": 0.5, "*conv1": 0.2}, rate=0.9, exclude=("layer3*",), at_least=4)
    after = widths(model)
    assert after["layer1.0.conv1"] == 5
    assert after["layer2.0.conv1"] == before["layer2.0.conv1"] * 0.8
    assert after["layer3.0.conv1"] == before["layer3.0.conv1"]
    model = resnet()
    prune(model, rate=0.9, multiple=4)
    assert all(n == before[name] or n % 4 == 0 for name, n in widths(model).items())
    assert min(widths(model).values()) == 4


def test_globally_a_layer_of_weak_filters_loses_more() -> None:
    for normalise, weaker in (("none", True), ("mean", False)):
        model = resnet()
        model.get_parameter("layer2.0.conv1.weight").data *= 0.01
        prune(model, rate=0.3, scope="global", normalise=normalise)
        assert (widths(model)["layer2.0.conv1"] == 1) == weaker


def test_a_steps_own_target_goes_before_the_recipes() -> None:
    model = resnet()
    whole = count_macs(model, EXAMPLE)[0]
    prune(model, "macs=40%", target="macs=70%")
    assert 0.65 * whole < count_macs(model, EXAMPLE)[0] <= 0.7 * whole


@pytest.mark.slow
def test_iterative_pruning_refers_to_the_original() -> None:
    train = {"method": "train", "fit": {"epochs": 1, "lr": 0.01}}
    steps = [{"method": "magnitude", "target": "macs=75%"}, train, {"method": "magnitude"}]
    report = tn.compress("resnet8", {"steps": steps}, data="digits", target="macs=50%", device="cpu").report
    macs = [step.after.macs / report.before.macs for step in report.steps]
    assert 0.73 < macs[0] == macs[1] <= 0.75
    assert 0.48 < macs[2] <= 0.5


def test_notes_name_what_is_left_whole() -> None:
    notes = prune(resnet(), rate=0.3, exclude=("layer1.0.conv1",)).notes
    assert any("channels removed by l1" in note for note in notes)
    assert "linear left whole: the network's output" in notes
    assert any(note.startswith("layer1.0.conv1 left whole: left out by include or exclude") for note in notes)


def test_recalibrated_statistics_are_those_of_the_pruned_network() -> None:
    plain, recalibrated = resnet(), resnet()
    prune(plain, rate=0.3)
    prune(recalibrated, rate=0.3, recalibrate_bn=2)
    assert torch.equal(plain.get_parameter("conv1.weight"), recalibrated.get_parameter("conv1.weight"))
    assert not torch.equal(plain.get_buffer("bn1.running_mean"), recalibrated.get_buffer("bn1.running_mean"))


def test_a_dry_run_needs_no_data() -> None:
    report = tn.compress("resnet8", {"steps": [{"method": "magnitude", "rate": 0.3, "score": "taylor"}]}, dry_run=True)
    assert report.report.after.macs < report.report.before.macs
    assert any("taylor needs data" in note for note in report.report.steps[0].notes)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TersenetError, "magnitude needs a rate .* or a target"),
        ({"rate": 0.3, "score": "taylor"}, TersenetError, "scores from data need training images"),
        ({"rate": 0.3, "recalibrate_bn": 2}, TersenetError, "recalibrate_bn needs training images"),
        ({"rate": 0.3, "include": ("layer9*",)}, UnknownNameError, "unknown layer 'layer9"),
        ({"rate": 0.3, "rates": {"fc": 0.1}}, UnknownNameError, "unknown layer 'fc'"),
        ({"rate": 0.3, "exclude": ("type:conv",)}, GraphError, "no layer is left to prune"),
        ({"target": "macs=50%", "at_least": 10}, TersenetError, "can't be met: with the selected layers"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = resnet()
    graph = ModelGraph(model, EXAMPLE)
    with pytest.raises(error, match=message):
        Magnitude(**settings).apply(graph, context_of(graph, data=None))
    assert graph.record.edits == ()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (resnet(), model)), strict=True))


def test_weights_that_are_not_finite() -> None:
    model = resnet()
    model.get_parameter("layer2.0.conv1.weight").data[3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match=r"Check the weights of layer2\.0\.conv1"):
        prune(model, rate=0.3)
    assert all(torch.equal(a.nan_to_num(), before[n].nan_to_num()) for n, a in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"rate": 1.0}, {"score": "l3"}, {"target": "macs=150%"}, {"rates": {"*": -0.1}}])
def test_settings_that_a_recipe_check_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Magnitude(**settings)


@pytest.mark.parametrize("recipe", ["magnitude_finetune", "magnitude"])
def test_shipped_recipes(recipe: str) -> None:
    training = recipe == "magnitude_finetune"
    overrides = {"steps.1.fit.epochs": 1} if training else {}
    data = "digits" if training else None
    report = tn.compress("resnet8", recipe, target="macs=40%", data=data, overrides=overrides, device="cpu").report
    assert 0.39 <= report.after.macs / report.before.macs <= 0.4
