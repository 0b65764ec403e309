"""The acceptance facts of soft filter pruning, one test each. Numbers marked "paper" are the published ones; the others
follow from the method's formulas and were computed independently of this package."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sfp_support import CLASSES, CPU, SHAPE, context, hooks_on, settings, state_of, tiny_data, zero_filters
from torch import nn

from graph_support import DenseNet, MobileNetV2, check_exact, compare_on, random_kept, randomise, reference
from tersenet.errors import GraphError
from tersenet.graph.compact import compact
from tersenet.graph.labels import Residual
from tersenet.graph.model import ModelGraph
from tersenet.measuring.macs import count_macs
from tersenet.methods.soft_filter_pruning import SoftFilterPruning, SoftPruning
from tersenet.models.build import build
from tersenet.models.preresnet_cifar import preresnet_cifar
from tersenet.models.resnet import Bottleneck, ResNet
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.models.vgg import vgg_cifar
from tersenet.nn.adapter import ChannelAdapter
from tersenet.ops.rate_schedule import asymptotic_decay, pruned_count, rate_at
from tersenet.recipe import load_recipe
from tersenet.train.hooks import TrainState
from tersenet.train.loop import fit
from tersenet.train.settings import Fit, lr_at


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet_cifar(8, width=10, classes=CLASSES)


def pruned_layers(hooks: SoftPruning) -> dict[str, int]:
    """Layer -> how many of its filters the last prune zeroed."""
    return {g.name: len(hooks.pruned[g.name]) for g in hooks.groups}


# -- facts 1 to 6: one prune


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_fact_01_every_selected_layer_has_exactly_floor_zero_filters(rate: float) -> None:
    model = small_resnet()
    hooks = hooks_on(model, settings(rate=rate, include=("layer*",)))
    before = copy.deepcopy(model.state_dict())
    hooks.prune(state_of(model, hooks.settings.fit), done=4)
    selected = {name for group in hooks.groups for name in group.producers}
    assert selected == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "layer" in name}
    for name, module in model.named_modules():
        if name in selected:
            weight = module.get_parameter("weight")
            assert len(zero_filters(weight)) == int(weight.shape[0] * rate + 1e-9)
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") not in selected:
            assert torch.equal(value, before[name]), name


def test_fact_02_the_smallest_norms_go() -> None:
    model = small_resnet()
    hooks = hooks_on(model, settings(rate=0.4))
    norms = {g.name: model.get_parameter(f"{g.name}.weight").detach().flatten(1).norm(dim=1) for g in hooks.groups}
    hooks.prune(state_of(model, hooks.settings.fit), done=4)
    assert norms
    for name, norm in norms.items():
        gone = torch.zeros(len(norm), dtype=torch.bool)
        gone[zero_filters(model.get_parameter(f"{name}.weight"))] = True
        assert norm[gone].max() <= norm[~gone].min(), name


def test_fact_03_nothing_else_is_touched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 10, 3), nn.Flatten(), nn.Linear(160, CLASSES)
    )
    hooks = hooks_on(model, settings(rate=0.4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, *SHAPE)).square().sum().backward()
    optimizer.step()
    before, momentum = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    hooks.prune(state_of(model, hooks.settings.fit, optimizer), done=4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "3.weight"}
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["momentum_buffer"], momentum["state"][i]["momentum_buffer"]) for i in after)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


@pytest.mark.parametrize("score", ["l2", "l1"])
def test_fact_04_pruning_twice_is_pruning_once(score: str) -> None:
    model = small_resnet()
    hooks = hooks_on(model, settings(score=score))
    state = state_of(model, hooks.settings.fit)
    hooks.prune(state, done=4)
    once = copy.deepcopy(model.state_dict())
    row = hooks.prune(state, done=4)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())
    assert (row["churn"], row["revived"]) == (0, 0)


@pytest.mark.parametrize("rate", [0.0, 0.09])
def test_fact_05_nothing_to_prune_is_the_identity(rate: float) -> None:
    model = resnet_cifar(8, width=2)  # at most 8 channels: 9 % of them is less than one
    randomise(model)
    method = settings(rate=rate)
    hooks = hooks_on(model, method)
    before = copy.deepcopy(model.state_dict())
    hooks.prune(state_of(model, hooks.settings.fit), done=4)
    method.finish(hooks.graph, context(), hooks)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks.graph.record.edits == ()


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, float("nan")])
def test_fact_05_a_rate_outside_0_to_1_is_rejected(rate: float) -> None:
    with pytest.raises(ValidationError):
        settings(rate=rate)


@pytest.mark.parametrize(
    ("size", "rate", "count"),
    [
        *[(64, 0.3, 19), (16, 0.3, 4), (64, 0.4, 25), (10, 0.1, 1), (160, 0.1, 16), (20, 0.1, 2), (50, 0.2, 10)],
        *[(16, 0.4, 6), (32, 0.4, 12), (32, 0.3, 9), (128, 0.3, 38), (256, 0.3, 76), (512, 0.3, 153)],
        *[(1024, 0.3, 307), (2048, 0.3, 614), (100, 0.1, 10)],
    ],
)
def test_fact_06_counts(size: int, rate: float, count: int) -> None:
    assert pruned_count(size, rate) == count


# -- facts 7, 8: revival and the loop


def revival_network(beta: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(360, CLASSES)
    )
    nn.init.constant_(model[1].bias, beta)
    return model.train()


def sgd_steps(model: nn.Module, optimizer: torch.optim.Optimizer, hooks: SoftPruning | None, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(16, *SHAPE, generator=generator)
        y = torch.randint(0, CLASSES, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if hooks is not None:
            hooks.before_step(state_of(model, hooks.settings.fit, optimizer))
        optimizer.step()


def zeros_after_one_step(beta: float, momentum: float, steps_before: int, revive: str = "both") -> tuple[int, int]:
    model = revival_network(beta)
    hooks = hooks_on(model, settings(rate=0.3, revive=revive))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    sgd_steps(model, optimizer, None, steps_before)
    model[1].bias.data.fill_(beta)
    hooks.prune(state_of(model, hooks.settings.fit, optimizer), done=4)
    pruned = len(zero_filters(model[0].weight))
    sgd_steps(model, optimizer, hooks, 1)
    return pruned, len(zero_filters(model[0].weight))


def test_fact_07_how_filters_come_back() -> None:
    assert zeros_after_one_step(beta=0.1, momentum=0.0, steps_before=0) == (3, 0)
    assert zeros_after_one_step(beta=0.0, momentum=0.0, steps_before=0) == (3, 3)
    assert zeros_after_one_step(beta=0.0, momentum=0.9, steps_before=5) == (3, 0)


def test_fact_07_a_policy_can_forbid_each_way() -> None:
    assert zeros_after_one_step(beta=0.1, momentum=0.0, steps_before=0, revive="momentum") == (3, 3)
    assert zeros_after_one_step(beta=0.0, momentum=0.9, steps_before=5, revive="gradient") == (3, 3)
    assert zeros_after_one_step(beta=0.1, momentum=0.9, steps_before=5, revive="none") == (3, 3)


class Spy(SoftPruning):
    """Notes when it pruned, and what."""

    def __init__(self, hooks: SoftPruning) -> None:
        super().__init__(hooks.settings, hooks.graph, hooks.rates)
        self.done: list[int] = []
        self.masks: list[dict[str, list[int]]] = []

    def prune(self, state: TrainState, done: int) -> dict[str, float]:
        row = super().prune(state, done)
        self.done.append(done)
        self.masks.append({name: units.tolist() for name, units in self.pruned.items()})
        return row


def train(model: nn.Module, hooks: SoftPruning, checkpoint: Path | None = None) -> list[dict[str, Any]]:
    return fit(
        model,
        tiny_data(),
        hooks.settings.fit,
        seed=3,
        device=CPU,
        hooks=hooks,
        checkpoint=checkpoint,
        log=lambda row: None,
    )


def test_fact_08_prunes_before_training_after_every_interval_and_at_the_end() -> None:
    model = small_resnet()
    spy = Spy(hooks_on(model, settings(interval=2, fit={"epochs": 4, "lr": 0.2})))
    rows = train(model, spy)
    assert spy.done == [0, 1, 3, 4]
    assert [bool(row.get("pruned")) for row in rows] == [True, False, True, True]
    assert spy.masks[0] != spy.masks[-1], "the mask is computed anew from the weights of the moment"


# -- facts 9, 10: the asymptotic schedule


def test_fact_09_the_asymptotic_curve() -> None:
    def curve(i: float, total: float = 200, goal: float = 0.3, start: float = 0.0) -> float:
        return rate_at("asymptotic", goal, start, 1 / 8, i, total)

    assert curve(0) == 0
    assert curve(200) == 0.3
    assert curve(0, start=0.1) == pytest.approx(0.1)
    assert curve(25) == pytest.approx(0.75 * 0.3, abs=1e-9)
    assert curve(50, total=400, goal=0.4, start=0.05) == pytest.approx(0.3, abs=1e-9)
    assert asymptotic_decay(0.3, 0.0, 1 / 8) == pytest.approx(11.08999, abs=1e-4)
    for knee, decay in [(1 / 4, 5.496252), (1 / 2, 2.197225), (1 / 16, 22.180719)]:
        assert asymptotic_decay(0.3, 0.0, knee) == pytest.approx(decay, abs=1e-5)
    values = {1: 0.01618, 5: 0.07264, 10: 0.12769, 25: 0.22500, 50: 0.28125, 100: 0.29883}
    for i, value in values.items():
        assert curve(i) == pytest.approx(value, abs=1e-5)
    assert [pruned_count(64, curve(i)) for i in (0, 1, 5, 10, 25, 50, 200)] == [0, 1, 4, 8, 14, 18, 19]
    points = np.array([curve(i) for i in range(201)])
    assert (np.diff(points) > 0).all()
    assert (np.diff(points, 2) < 0).all()


def test_fact_10_the_last_prune_uses_exactly_the_goal() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Flatten(), nn.Linear(1440, CLASSES))
    spy = Spy(hooks_on(model, settings(schedule="asymptotic", fit={"epochs": 3})))
    train(model, spy)
    assert [len(mask["0"]) for mask in spy.masks][-1] == 12
    assert len(zero_filters(model[0].weight)) == 12
    assert pruned_count(40, rate_at("asymptotic", 0.3, 0, 1 / 8, 199, 200)) == 11, "one epoch earlier it is one less"


# -- fact 11: what is saved is pruned


@pytest.mark.parametrize("changes", [{}, {"schedule": "asymptotic"}, {"interval": 2}, {"fit": {"keep": "best"}}])
def test_fact_11_the_final_checkpoint_is_pruned(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_resnet()
    hooks = hooks_on(model, settings(**changes))
    train(model, hooks, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for state in [saved["model"], model.state_dict(), *([saved["best"]["weights"]] if saved["best"] else [])]:
        for group in hooks.groups:
            weight = state[f"{group.name}.weight"]
            assert len(zero_filters(weight)) == int(group.size * 0.3 + 1e-9)


def test_fact_11_best_weights_are_cut_by_their_own_mask() -> None:
    model = small_resnet()
    method = settings(fit={"keep": "best", "lr": 0.3, "epochs": 5}, constants="exact")
    hooks = hooks_on(model, method)
    train(model, hooks)
    # As if an earlier epoch, with another mask, had been the best.
    hooks.pruned = {name: (units + 1) % hooks.graph.group(name).size for name, units in hooks.pruned.items()}
    hooks.pruned = {name: units.sort().values for name, units in hooks.pruned.items()}
    masked = copy.deepcopy(model)
    method.finish(hooks.graph, context(), hooks)
    assert compare_on(masked, model, (torch.randn(3, *SHAPE),)) < 1e-5


# -- facts 12 to 14: compaction


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: resnet_cifar(8, width=8),
    "basic_projection": lambda: resnet_cifar(8, projection=True, width=8),
    "bottleneck": lambda: ResNet(Bottleneck, (2, 1, 1, 1), 7, 3, 6),
    "preact": lambda: preresnet_cifar(14, width=6),
    "preact_bottleneck": lambda: preresnet_cifar(11, bottleneck=True, width=5),
    "vgg": lambda: vgg_cifar(11, width=5),
    "mobilenet": MobileNetV2,
    "densenet": DenseNet,
}


@pytest.mark.parametrize(
    ("residual", "dtype"),
    [("independent", torch.float64), ("coupled", torch.float64)]
    + [pytest.param(r, torch.float32, marks=pytest.mark.slow) for r in ("independent", "coupled")],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_fact_12_compact_equals_masked(name: str, residual: Residual, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    size = 32 if name in ("vgg", "bottleneck") else 16  # these halve the image five times
    _, done = check_exact(NETWORKS[name](), (torch.zeros(2, 3, size, size),), residual, dtype=dtype)
    assert done.equality.relative <= done.equality.tolerance
    # Only what runs through a padded depthwise convolution can't be compensated.
    assert bool(done.zeroed) == (name == "mobilenet")


@pytest.mark.parametrize("name", ["basic", "mobilenet", "densenet"])
def test_fact_12_in_float32(name: str) -> None:
    check_exact(NETWORKS[name](), (torch.zeros(2, 3, 16, 16),), "independent", dtype=torch.float32)


@pytest.mark.parametrize("constants", ["exact", "zero"])
def test_fact_12_in_every_mode_of_constants(constants: Any) -> None:
    graph, done = check_exact(NETWORKS["basic"](), (torch.zeros(2, 3, 16, 16),), "independent", constants=constants)
    assert bool(done.zeroed) == (constants == "zero")
    wrapped = [m for m in graph.model.modules() if isinstance(m, ChannelAdapter)]
    assert any(m.taps is not None for m in wrapped) == (constants == "exact")


def test_fact_13_a_positive_constant_is_compensated_or_refused() -> None:
    def network(second: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), second, nn.Conv2d(8, 5, 1))

    compensated = randomise(network(nn.Conv2d(8, 8, 3, padding=1))).double()
    for beta in (0.0, 0.7):
        model = copy.deepcopy(compensated)
        model[1].bias.data[:] = beta
        graph = ModelGraph(model, (torch.zeros(2, 3, 8, 8).double(),))
        kept = {"0": np.arange(4)}
        expected = reference(graph, kept)
        compact(graph, kept, "exact")
        assert compare_on(expected, model, (torch.randn(2, 3, 9, 11).double(),)) < 1e-12
        assert model[0].out_channels == 4

    refused = randomise(network(nn.Conv2d(8, 8, 3, padding=1, groups=8)))
    refused[1].bias.data[:] = 2.0
    before = copy.deepcopy(refused.state_dict())
    with pytest.raises(GraphError, match=r"not constant at .*constants: zero"):
        compact(ModelGraph(refused, (torch.zeros(2, 3, 8, 8),)), {"0": np.arange(4)}, "exact")
    assert all(torch.equal(value, before[name]) for name, value in refused.state_dict().items())
    assert refused[0].out_channels == 8


def test_fact_14_blocks_of_a_stage_drop_different_outputs() -> None:
    model = randomise(resnet_cifar(14, width=8)).double()
    graph = ModelGraph(model, (torch.zeros(2, 3, 16, 16).double(),), "independent")
    kept = {"layer1.0.conv2": np.arange(4), "layer1.1.conv2": np.arange(4, 8)}
    expected = reference(graph, kept)
    compact(graph, kept, "exact")
    assert compare_on(expected, model, (torch.randn(2, 3, 16, 16).double(),)) < 1e-12
    adapters = [model.get_submodule(f"layer1.{i}.bn2") for i in (0, 1)]
    assert [a.scatter.tolist() for a in adapters] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(a.constant.abs().sum() > 0 for a in adapters), "what batch norm emits for a zero filter is kept"
    assert model.get_submodule("layer1.1.conv1").in_channels == 8, "the trunk keeps its width"


# -- facts 15, 16: counts


def conv_macs(model: nn.Module, rate: float, shape: tuple[int, ...]) -> tuple[float, float, int]:
    """Convolution MACs of a network on meta: all of them, with fractional channels, and with whole ones."""
    graph = ModelGraph(model, (torch.zeros(1, *shape, device="meta"),), "independent")
    method = settings(rate=rate)
    rates = method.plan(graph, context())
    shares = np.ones(int(graph.units.of.max()) + 1)
    for group, share in rates.items():
        shares[graph.group(group).units] = 1 - share
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    return graph.macs() - linear, graph.macs_of(shares) - linear, graph.macs(method.kept(graph, rates)) - linear


def formula(depth: int, count: Callable[[int], float]) -> float:
    """The paper's count for CIFAR ResNets, convolutions only; `count`: channels left of so many."""
    total, width = 32 * 32 * 27 * count(16), 16
    for stage, size in ((16, 32), (32, 16), (64, 8)):
        for block in range((depth - 2) // 6):
            first = stage == 16 and block == 0
            total += 9 * size * size * (count(16) if first else width) * count(stage)
            total += 9 * size * size * count(stage) ** 2
            width = stage
    return total


# Depth -> baseline, cuts in % at rates 0.1 to 0.4 with fractional channels (paper), and with whole ones.
CIFAR = {
    20: (40_550_400, (15.24, 29.31, 42.22, 53.96), (12.58, 27.61, 39.04, 51.70)),
    32: (68_861_952, (14.93, 28.77, 41.51, 53.16), (12.40, 27.10, 38.44, 50.92)),
    56: (125_485_056, (14.74, 28.42, 41.06, 52.63), (12.28, 26.77, 38.05, 50.41)),
    110: (252_887_040, (14.62, 28.21, 40.78, 52.31), (12.21, 26.57, 37.81, 50.11)),
}


@pytest.mark.parametrize("depth", CIFAR)
def test_fact_15_flops_of_the_cifar_resnets(depth: int) -> None:
    baseline, fractional, integer = CIFAR[depth]
    assert formula(depth, float) == baseline
    for rate, paper, whole in zip((0.1, 0.2, 0.3, 0.4), fractional, integer, strict=True):
        assert 100 * (1 - formula(depth, lambda n, r=rate: n * (1 - r)) / baseline) == pytest.approx(paper, abs=0.005)
        left = formula(depth, lambda n, r=rate: n - int(n * r + 1e-9))
        assert 100 * (1 - left / baseline) == pytest.approx(whole, abs=0.005)


@pytest.mark.parametrize(("depth", "rate"), [(20, 0.1), (56, 0.4), pytest.param(110, 0.3, marks=pytest.mark.slow)])
def test_fact_15_the_graph_counts_by_the_formula(depth: int, rate: float) -> None:
    with torch.device("meta"):
        model = build(f"resnet{depth}")
    whole, fractional, integer = conv_macs(model, rate, (3, 32, 32))
    assert whole == formula(depth, float)
    assert fractional == pytest.approx(formula(depth, lambda n: n * (1 - rate)), rel=1e-9)
    assert integer == formula(depth, lambda n: n - int(n * rate + 1e-9))


@pytest.mark.parametrize(
    ("depth", "rate", "cut"), [(20, 0.3, 39.04), pytest.param(56, 0.4, 50.41, marks=pytest.mark.slow)]
)
def test_fact_15_the_compact_model_costs_what_was_counted(depth: int, rate: float, cut: float) -> None:
    with torch.device("meta"):
        before = build(f"resnet{depth}")
    model = build(f"resnet{depth}")
    example = torch.zeros(1, 3, 32, 32)
    settings(rate=rate).preview(ModelGraph(model, (example,)), context())
    measured, uncounted = count_macs(model, example)
    linear = 640
    assert uncounted == []
    assert measured - linear == formula(depth, lambda n: n - int(n * rate + 1e-9))
    whole = count_macs(before, torch.zeros(1, 3, 32, 32, device="meta"))[0] - linear
    assert 100 * (1 - (measured - linear) / whole) == pytest.approx(cut, abs=0.005)


@pytest.mark.parametrize(
    ("depth", "paper", "torchvision"),
    [
        (18, 41.73, 41.73),
        (50, 42.22, 41.53),
        pytest.param(34, 41.11, 41.11, marks=pytest.mark.slow),
        pytest.param(101, 44.10, 43.69, marks=pytest.mark.slow),
        pytest.param(152, 44.75, 44.45, marks=pytest.mark.slow),
    ],
)
def test_fact_15_flops_of_the_imagenet_resnets(depth: int, paper: float, torchvision: float) -> None:
    """The published bottleneck has its stride in the first 1x1 convolution, torchvision's and ours in the 3x3."""
    for stride_first, cut in ((True, paper), (False, torchvision))[: 1 if paper == torchvision else 2]:
        with torch.device("meta"):
            model = build(f"resnet{depth}")
        for block in model.modules():
            if isinstance(block, Bottleneck) and stride_first:
                block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
        whole, fractional, _ = conv_macs(model, 0.3, (3, 224, 224))
        assert 100 * (1 - fractional / whole) == pytest.approx(cut, abs=0.005)


def test_fact_16_shapes_of_resnet50() -> None:
    model = build("resnet50", classes=10)
    settings(rate=0.3).preview(ModelGraph(model, (torch.zeros(1, 3, 64, 64),)), context())
    shapes = {name.replace(".inner", ""): tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["conv1.weight"] == (45, 3, 7, 7)
    assert shapes["layer1.0.conv1.weight"] == (45, 45, 1, 1)
    assert shapes["layer1.0.conv2.weight"] == (45, 45, 3, 3)
    assert shapes["layer1.0.conv3.weight"] == (180, 45, 1, 1)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 45, 1, 1)
    assert shapes["layer1.1.conv1.weight"] == (45, 256, 1, 1)
    assert shapes["layer2.0.downsample.0.weight"] == (512, 256, 1, 1)
    assert shapes["layer4.2.conv3.weight"] == (1434, 359, 1, 1)
    assert shapes["fc.weight"] == (10, 2048)


# -- facts 17 to 19: resume, ranks, the learning rate


class Interrupted(Exception):
    pass


class Breaks(SoftPruning):
    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        if state.epoch == 2:
            raise Interrupted
        return super().after_epoch(state)


def test_fact_17_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    method = settings(schedule="asymptotic", interval=2, fit={"epochs": 5, "lr": 0.1})
    whole = small_resnet()
    straight = hooks_on(whole, method)
    rows = train(whole, straight, tmp_path / "whole.pt")

    stopped = small_resnet()
    breaks = Breaks(method, ModelGraph(stopped, (torch.zeros(2, *SHAPE),), "independent"), straight.rates)
    with pytest.raises(Interrupted):
        train(stopped, breaks, tmp_path / "stopped.pt")
    resumed = small_resnet()
    again = hooks_on(resumed, method)
    rows_again = train(resumed, again, tmp_path / "stopped.pt")

    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in rows_again]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert {n: u.tolist() for n, u in again.pruned.items()} == {n: u.tolist() for n, u in straight.pruned.items()}
    finished = hooks_on(small_resnet(), method)
    train(finished.graph.model, finished, tmp_path / "stopped.pt")
    assert {n: u.tolist() for n, u in finished.kept().items()} == {n: u.tolist() for n, u in straight.kept().items()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_fact_18_masks_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    script = Path(__file__).with_name("masks_on_a_rank.py")
    done = subprocess.run(
        [*command, "--master-port", str(free_port()), str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["masks"] == second["masks"]
    assert any(first["masks"].values())


def test_fact_19_the_learning_rates_of_the_cifar_recipe() -> None:
    (step,) = load_recipe("sfp_resnet20_cifar10").steps
    assert isinstance(step, SoftFilterPruning)
    assert step.fit == Fit(**step.fit.model_dump())
    plan = {0: 0.01, 1: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 199: 0.0008}
    for epoch, lr in plan.items():
        for at in (0, 390):
            assert lr_at(step.fit, epoch, at, 391) == pytest.approx(lr), epoch


def test_random_kept_covers_the_groups() -> None:
    """The support code itself: it removes something from every group that it may."""
    graph = ModelGraph(small_resnet(), (torch.zeros(2, *SHAPE),), "independent")
    kept = random_kept(graph, 0.3)
    assert set(kept) == {group.name for group in graph.groups} - {"linear"}
    assert all(len(places) < graph.group(name).size for name, places in kept.items())
