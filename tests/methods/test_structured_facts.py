"""Structured sparsification: facts 8 to 20 of its specification, on tiny networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sfp_support import CLASSES, CPU, SHAPE, context, state_of, tiny_data
from structured_support import gathers, graph_of, hooks_on, layers_of, random_grouping, settings
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from graph_support import DenseNet, compare_on, randomise
from tersenet.errors import GraphError, TersenetError
from tersenet.exporting import artifact
from tersenet.graph.edits import Group
from tersenet.graph.grouping import Grouping, group_convolutions, groupable, kernel_norms, mask_groups
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import attach
from tersenet.group_learning.hooks import GroupLearning
from tersenet.measuring.macs import count_macs, params_of
from tersenet.methods.magnitude import Magnitude
from tersenet.methods.structured_sparsification import StructuredSparsification
from tersenet.methods.train import Train
from tersenet.models.build import build_skeleton
from tersenet.models.resnet import BasicBlock, Bottleneck, ResNet
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.ops.channel_order import Order
from tersenet.ops.group_levels import cost_matrix, group_counts, relationship_matrix
from tersenet.ops.sparsity_control import global_threshold, next_strength
from tersenet.recipe import load_recipe
from tersenet.train.hooks import Hooks, TrainState
from tersenet.train.loop import fit
from tersenet.train.settings import Fit, lr_at


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet_cifar(8, width=8, classes=CLASSES)


def run(model: nn.Module, hooks: Hooks, fit_settings: Fit, checkpoint: Path | None = None) -> list[dict[str, Any]]:
    return fit(
        model, tiny_data(), fit_settings, seed=3, device=CPU, hooks=hooks, checkpoint=checkpoint, log=lambda row: None
    )


@pytest.mark.parametrize("level", [1, 2, 4, 9])
def test_fact_08_the_regulariser_is_the_gradient_of_the_penalty(level: int) -> None:
    """Up to the finest level, beyond which nothing finer is left to push to."""
    model = small_resnet().double()
    hooks = hooks_on(model, settings(warmup=0, strength=0.3))
    hooks.before_training(state_of(model, hooks.settings.fit))
    hooks.levels = {name: min(level, len(hooks.counts[name])) for name in hooks.layers}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hooks.before_step(state_of(model, hooks.settings.fit, optimizer))
    for name, layer in hooks.layers.items():
        weight = model.get_parameter(layer.weight)
        counts = hooks.counts[name]
        depth = min(level, len(counts) - 1)
        cost = cost_matrix(layer.C_out, layer.C_in, counts, 0.5, depth)
        rows, columns = np.argsort(hooks.orders[name].rows), np.argsort(hooks.orders[name].columns)
        R = torch.from_numpy(cost[rows][:, columns])
        free = weight.detach().clone().requires_grad_()
        (0.3 * (R[:, :, None, None] * free.abs()).sum()).backward()
        torch.testing.assert_close(weight.grad, free.grad, rtol=0, atol=1e-7)
        finer = torch.from_numpy(relationship_matrix(layer.C_out, layer.C_in, counts[depth])[rows][:, columns])
        assert weight.grad is not None
        assert not weight.grad[finer].any()
        assert weight.grad[~finer].all()
    others = {n for n, _ in model.named_parameters()} - {x.weight for x in hooks.layers.values()}
    assert all(not model.get_parameter(name).grad.any() for name in others)


def test_fact_09_the_warmup_has_no_regulariser() -> None:
    model = small_resnet()
    hooks = hooks_on(model, settings(warmup=2, sparsity=0.5, strength=0.01))
    rows = run(model, hooks, hooks.settings.fit)
    assert [row["strength"] for row in rows[:3]] == [0, 0, 0.01]
    assert rows[3]["strength"] == pytest.approx(0.02), "below the goal and slow: one step more"
    plain = run(small_resnet(), Hooks(), hooks.settings.fit)
    assert [a["train_loss"] == b["train_loss"] for a, b in zip(rows, plain, strict=True)] == [True, True, False, False]


def test_fact_09_what_the_controller_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called after every epoch that is no warm-up; what was saved before is known from the warm-up too."""
    told: list[tuple[Any, ...]] = []

    def controller(strength: float, step: float, *others: Any) -> float:
        told.append((step, *others))
        return next_strength(strength, step, *others)

    monkeypatch.setattr("tersenet.group_learning.hooks.next_strength", controller)
    # At a threshold of 0.45 the learned orders save something from the first epoch on.
    hooks = hooks_on(small_resnet(), settings(warmup=2, sparsity=0.6, threshold=0.45))
    saved = [row["saved"] for row in run(hooks.graph.model, hooks, hooks.settings.fit)]
    assert saved[1] > 0
    assert told == [(1e-3, saved[2], saved[1], 0.6, 2, 4, None), (1e-3, saved[3], saved[2], 0.6, 1, 4, None)]


def learning_of_resnet20(seed: int) -> tuple[GroupLearning, Callable[[float, dict[str, Any]], float]]:
    """The sparse phase of a random ResNet-20, and its search: the threshold for a goal, by the norms kept."""
    torch.manual_seed(seed)
    hooks = hooks_on(resnet_cifar(20), settings(rounds=1), shape=(3, 32, 32))
    assert len(hooks.layers) == 18
    return hooks, lambda goal, kept: global_threshold(lambda q: hooks.costs.saved(hooks.levels_at(q, kept)), goal)


def test_fact_10_random_weights_come_to_two_groups() -> None:
    """The specification's figures for one random network, all at once: q = .5024, 18 layers of 2 groups, .5 for .4.

    They are of the orders that the network came with: in learned ones two groups keep more than half of a layer's norm,
    and q stays below 1/2. There each layer comes to two groups at a threshold of its own, within .015 of 1/2, and the
    search ends where four fifths of the weights have. That the rest has come too by then is chance: of the seeds 0 to
    2999 it is so for four, of which 197 is the first. What is so for all of them is in the next test.
    """
    hooks, search = learning_of_resnet20(197)
    kept = hooks.norms_kept(hooks.norms(hooks.graph.model))
    threshold = search(0.4, kept)
    levels = hooks.levels_at(threshold, kept)
    assert threshold == 1029 / 2048 == pytest.approx(0.5024, abs=5e-5)
    assert [*levels.values()] == [2] * 18
    assert hooks.costs.saved(levels) == 0.5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_fact_10_any_random_weights_come_to_two_groups_at_most(seed: int, learned: bool) -> None:
    hooks, search = learning_of_resnet20(seed)
    model = hooks.graph.model
    kept = hooks.norms_kept(hooks.learn_orders(model, 20) if learned else hooks.norms(model))
    # Of two groups, as the masks have them.
    needed: dict[str, float] = {}
    for name, S in hooks.norms(model).items():
        inside = hooks.orders[name].back(relationship_matrix(S.shape[0], S.shape[1], 2))
        needed[name] = 1 - float(S[inside].sum() / S.sum())
    assert all(q < 0.5 for q in needed.values()) or not learned
    whole = sum(layer.params for layer in hooks.layers.values())

    def halved(q: float) -> float:
        return sum(hooks.layers[name].params for name in needed if needed[name] <= q) / whole

    threshold = search(0.4, kept)
    levels = hooks.levels_at(threshold, kept)
    # The least multiple of 1 / 2048 at which four fifths of the weights are in layers of two groups.
    assert threshold * 2048 == int(threshold * 2048)
    assert halved(threshold) >= 0.8 > halved(threshold - 1 / 2048)
    assert levels == {name: 2 if needed[name] <= threshold else 1 for name in needed}
    assert hooks.costs.saved(levels) == pytest.approx(halved(threshold) / 2)
    assert {*hooks.levels_at(search(0.5, kept), kept).values()} == {2}, "asked for half, they all come to it"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (1, 2, 1), (3, 1, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_fact_11_grouped_equals_masked(
    kernel: int, stride: int, dilation: int, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 8, kernel, stride, kernel // 2, dilation, bias=bias, padding_mode="reflect").to(dtype)
    random = np.random.default_rng(0)
    order = Order(random.permutation(8), random.permutation(16))
    x = torch.randn(2, 16, 9, 7, dtype=dtype)
    for groups in group_counts(8, 16):
        masked = copy.deepcopy(conv)
        inside = torch.from_numpy(order.back(relationship_matrix(8, 16, groups)))
        masked.weight.data *= inside[:, :, None, None]
        made = GroupShuffleConv2d.from_conv(conv, groups, tuple(order.rows.tolist()), tuple(order.columns.tolist()))
        assert made.weight.shape == (8, 16 // groups, kernel, kernel)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            assert compare_on(masked, made, (given,)) <= tolerance


class Chain(nn.Sequential):
    """Two convolutions with biases, one straight behind the other."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.PReLU(12), nn.Conv2d(12, 8, 1)]
        super().__init__(*layers, nn.ReLU(), nn.Conv2d(8, 5, 1))


# Network, gathers unfused and fused: one less for each place between two grouped convolutions, for each side of a
# trunk of which one layer may choose the order, and for each side that only plain layers are on.
FUSED = {
    "chain": (Chain, 4, 1),
    "basic": (lambda: resnet_cifar(8, width=8), 12, 8),
    "projection": (lambda: resnet_cifar(8, width=8, projection=True), 16, 10),
    "bottleneck": (lambda: ResNet(Bottleneck, (1, 1, 1, 1), 4, 3, 8), 32, 19),
    "dense": (DenseNet, 6, 1),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", FUSED)
def test_fact_12_fused_equals_unfused_equals_masked(name: str, dtype: torch.dtype, tolerance: float) -> None:
    build, unfused, fused = FUSED[name]
    torch.manual_seed(0)
    graph = graph_of(build(), 32 if name == "bottleneck" else 16, dtype)
    groupings: dict[str, Grouping] = {}
    for i, layer in enumerate(layers_of(graph)):
        counts = group_counts(layer.C_out, layer.C_in)
        if len(counts) > 1:
            groupings[layer.name] = random_grouping(layer, counts[1 + i % (len(counts) - 1)], i)
    mask_groups(graph, groupings)
    plain, done = graph.copy(), graph.copy()
    assert group_convolutions(plain, groupings, fuse=False).relative <= tolerance
    assert group_convolutions(done, groupings, fuse=True).relative <= tolerance
    x = (torch.randn(3, *graph.example[0].shape[1:], dtype=dtype),)
    assert compare_on(graph.model, plain.model, x) <= tolerance
    assert compare_on(graph.model, done.model, x) <= tolerance
    assert compare_on(plain.model, done.model, x) <= tolerance
    assert (gathers(plain.model), gathers(done.model)) == (unfused, fused)
    assert gathers(plain.model) >= 2 * len(groupings) - 1, "a drawn order is hardly ever the identity"


def test_fact_12_what_depends_on_the_order_is_left_unfused() -> None:
    """A scale that is written in forward: channels can't be put in another order before it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.stem(x).relu())
            return self.b(y * torch.arange(1.0, 9.0, dtype=y.dtype).view(1, 8, 1, 1))

    graph = graph_of(Scaled())
    groupings = {"a": random_grouping(next(x for x in layers_of(graph) if x.name == "a"), 4)}
    mask_groups(graph, groupings)
    masked = copy.deepcopy(graph.model)
    assert group_convolutions(graph, groupings).relative <= 1e-10
    assert compare_on(masked, graph.model, (torch.randn(2, 3, 16, 16, dtype=torch.float64),)) <= 1e-10
    assert isinstance(graph.model.get_submodule("a"), GroupShuffleConv2d)


def connections(conv: GroupShuffleConv2d) -> Tensor:
    """(C_out, C_in): which outputs depend on which inputs, by its gradients."""
    x = torch.randn(1, conv.in_channels, 5, 5, requires_grad=True)
    y = conv(x).sum((0, 2, 3))
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].abs().sum((0, 2, 3)) > 0 for value in y]
    return torch.stack(rows)


@pytest.mark.parametrize("fuse", [False, True])
def test_fact_13_density_of_the_mask_of_what_is_trained_and_of_the_file(tmp_path: Path, fuse: bool) -> None:
    """What was masked is no weight any more: it can't come back, in training or from the file."""
    model = small_resnet()
    graph = ModelGraph(model, (torch.zeros(2, *SHAPE),))
    groupings = {x.name: random_grouping(x, (2, 4, 8)[i % 3], i) for i, x in enumerate(layers_of(graph))}
    mask_groups(graph, groupings)
    for name, grouping in groupings.items():
        weight = model.get_parameter(f"{name}.weight")
        assert int(weight.count_nonzero()) == weight.numel() // grouping.groups
    masks = {name: model.get_parameter(f"{name}.weight").detach().abs().sum((2, 3)) > 0 for name in groupings}
    attach(model, graph.record)
    group_convolutions(graph, groupings, fuse)
    run(model, Hooks(), Fit(epochs=2, lr=0.1, weight_decay=1e-4))
    artifact.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for known in (model, artifact.load(tmp_path, base=small_resnet())):
        for name, grouping in groupings.items():
            conv = known.get_submodule(name)
            assert isinstance(conv, GroupShuffleConv2d)
            whole = conv.out_channels * conv.in_channels * 9
            assert stored[f"{name}.weight"].numel() == conv.weight.numel() == whole // grouping.groups
            found = connections(conv)
            if fuse:
                assert int(found.sum()) == found.numel() // grouping.groups
            else:
                assert torch.equal(found, masks[name])


def test_fact_14_parameters_of_resnet50() -> None:
    model = build_skeleton("resnet50")
    assert params_of(model) == 25_557_032
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"}
    assert len(layers) == 52
    for name, conv in layers.items():
        rows, columns = tuple(reversed(range(conv.out_channels))), tuple(range(conv.in_channels))
        Group(module=name, groups=2, rows=rows, columns=columns).replay(model)
    assert params_of(model) == 25_557_032 - 23_445_504 // 2 == 13_834_280


def test_fact_14_parameters_and_macs_of_a_run() -> None:
    model = small_resnet()
    graph = ModelGraph(model, (torch.zeros(1, *SHAPE),))
    hooks = hooks_on(model, settings(sparsity=0.6))
    groupings = hooks.decide()
    expected = graph.params() - sum(
        x.params - x.params // groupings[x.name].groups for x in layers_of(graph) if x.name in groupings
    )
    predicted = hooks.macs(groupings)
    mask_groups(hooks.graph, groupings)
    group_convolutions(hooks.graph, groupings)
    assert params_of(model) == expected
    assert count_macs(model, (torch.zeros(1, *SHAPE),))[0] == predicted


class OddAndDead(nn.Module):
    """3 and 9 channels, a layer of zeros, and one that can be grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.odd, self.dead = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 3, 1), nn.Conv2d(3, 8, 1)
        self.zero, self.fine = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        nn.init.zeros_(self.zero.weight)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dead(self.odd(self.stem(x).relu())).relu()
        return self.head(self.fine(self.zero(x) + x[:, :, 1:-1, 1:-1]).mean((2, 3)))


def test_fact_15_odd_and_dead_layers() -> None:
    torch.manual_seed(0)
    model = OddAndDead()
    hooks = hooks_on(model, settings(sparsity=0.2))
    run(model, hooks, hooks.settings.fit)
    nn.init.zeros_(model.zero.weight)
    groupings = hooks.decide()
    assert set(groupings) == {"fine"}
    assert {hooks.counts[name] for name in ("odd", "dead")} == {(1,)}
    done = context(evaluate=lambda: None)
    hooks.settings.finish(hooks.graph, done, hooks)
    assert isinstance(model.fine, GroupShuffleConv2d)
    assert type(model.zero) is type(model.odd) is nn.Conv2d


def test_fact_16_blocks_put_out_channels_in_the_old_order() -> None:
    """No layer of a trunk has to change with the others. (Fused, a trunk can get another order.)"""
    graph = graph_of(resnet_cifar(14, width=8, projection=True))
    groupings = {x.name: random_grouping(x, 4, i) for i, x in enumerate(layers_of(graph))}
    mask_groups(graph, groupings)
    masked = copy.deepcopy(graph.model)
    group_convolutions(graph, groupings, fuse=False)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    outputs: list[list[Tensor]] = []
    for model in (masked, graph.model):
        kept: list[Tensor] = []
        for block in (m for m in model.modules() if isinstance(m, BasicBlock)):
            block.register_forward_hook(lambda module, args, y, kept=kept: kept.append(y))
        with torch.no_grad():
            model(x)
        outputs.append(kept)
    assert len(outputs[0]) == 6
    for a, b in zip(*outputs, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * float(a.abs().max())


def test_fact_17_without_strength_it_is_plain_training() -> None:
    plain, learned = small_resnet(), small_resnet()
    method = settings(strength=0.0, every_steps=1)
    hooks = hooks_on(learned, method)
    run(learned, hooks, method.fit)
    run(plain, Hooks(), method.fit)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, learned.state_dict()[name]), name
    assert any(not np.array_equal(o.rows, np.arange(len(o.rows))) for o in hooks.orders.values())


IMAGENET = ["structured_resnet50_imagenet", "structured_resnet101_imagenet", "structured_densenet201_imagenet"]
CIFAR = [f"structured_resnet{depth}_cifar10" for depth in (20, 56, 110)]


@pytest.mark.parametrize("name", [*IMAGENET, *CIFAR])
def test_fact_18_learning_rates_of_the_recipes(name: str) -> None:
    learning, tuning = load_recipe(name).steps
    assert isinstance(learning, StructuredSparsification)
    assert isinstance(tuning, Train)
    steps = 7
    sparse, tune = learning.fit, tuning.fit
    # The sparse phase: constant, without weight decay; its warm-up is of the regulariser only.
    assert {lr_at(sparse, epoch, at, steps) for epoch in range(sparse.epochs) for at in (0, steps - 1)} == {0.1}
    assert (sparse.epochs, sparse.weight_decay, learning.warmup) == ((60, 0, 5) if name in IMAGENET else (100, 0, 10))
    assert (sparse.momentum, sparse.nesterov, tune.momentum, tune.nesterov) == (0.9, False, 0.9, False)
    assert (learning.threshold, learning.decay, learning.strength, learning.gain) == (0.1, 0.5, 2e-6, None)
    assert tune.weight_decay == 1e-4
    rates = [lr_at(tune, epoch, at, steps) for epoch in range(tune.epochs) for at in range(steps)]
    if name in IMAGENET:
        assert tune.epochs == 120
        warm, total = 5 * steps, 120 * steps
        plan = [0.1 * (i + 1) / warm for i in range(warm)]
        # The plan ends at 0, one step behind the last that is taken.
        plan += [0.1 * (1 + np.cos(np.pi * (i - warm) / (total - warm))) / 2 for i in range(warm, total)]
        assert rates == pytest.approx(plan)
        assert rates[warm - 1] == pytest.approx(0.1)
        assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    else:
        assert tune.epochs == 160
        assert rates[: 10 * steps] == pytest.approx([0.1 * (i + 1) / (10 * steps) for i in range(10 * steps)])
        rest = [rates[epoch * steps : (epoch + 1) * steps] for epoch in (10, 79, 80, 119, 120, 159)]
        assert rest == [pytest.approx([lr] * steps) for lr in (0.1, 0.1, 0.01, 0.01, 0.001, 0.001)]


class Killed(Exception):
    pass


class KilledLearning(GroupLearning):
    at = 5

    def after_step(self, state: TrainState) -> None:
        super().after_step(state)
        if state.step == self.at:
            raise Killed


class KilledHooks(Hooks):
    def after_step(self, state: TrainState) -> None:
        if state.step == 5:
            raise Killed


def test_fact_19_the_sparse_phase_goes_on_where_it_stopped(tmp_path: Path) -> None:
    method = settings(every_steps=3, restarts=1, gain=2.0)
    whole, broken, resumed = small_resnet(), small_resnet(), small_resnet()
    first, last = hooks_on(whole, method), hooks_on(resumed, method)
    rows = run(whole, first, method.fit)
    killed = hooks_on(broken, method)
    killed.__class__ = KilledLearning
    with pytest.raises(Killed):
        run(broken, killed, method.fit, tmp_path / "checkpoint.pt")
    again = run(resumed, last, method.fit, tmp_path / "checkpoint.pt")
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in again]
    assert (first.strength, first.saved, first.levels) == (last.strength, last.saved, last.levels)
    assert first.maps == last.maps
    assert {shown.epoch for shown in first.maps} == {0, 1, 2, 3}
    for name, order in first.orders.items():
        assert np.array_equal(order.rows, last.orders[name].rows)
        assert np.array_equal(order.columns, last.orders[name].columns)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    groupings, others = first.decide(), last.decide()
    assert groupings.keys() == others.keys()
    mask_groups(first.graph, groupings)
    mask_groups(last.graph, others)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_fact_19_fine_tuning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The groups are structure by then: the saved network and the training's checkpoint are all there is."""
    model = small_resnet()
    graph = ModelGraph(model, (torch.zeros(2, *SHAPE),))
    attach(model, graph.record)
    groupings = {x.name: random_grouping(x, 2, i) for i, x in enumerate(layers_of(graph))}
    mask_groups(graph, groupings)
    group_convolutions(graph, groupings)
    artifact.save(model, tmp_path / "model")
    method = Train(fit=Fit(epochs=4, lr=0.05))
    whole, broken, resumed = (artifact.load(tmp_path / "model", base=small_resnet()) for _ in range(3))
    rows = run(whole, Hooks(), method.fit)
    with pytest.raises(Killed):
        run(broken, KilledHooks(), method.fit, tmp_path / "checkpoint.pt")
    again = run(resumed, Hooks(), method.fit, tmp_path / "checkpoint.pt")
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in again]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_fact_20_one_group_stays_a_plain_convolution() -> None:
    graph = graph_of(resnet_cifar(8, width=8))
    layers = layers_of(graph)
    groupings = {x.name: random_grouping(x, 1 + i % 2, i) for i, x in enumerate(layers)}
    mask_groups(graph, groupings)
    group_convolutions(graph, groupings)
    for i, layer in enumerate(layers):
        assert type(graph.model.get_submodule(layer.name)) is (GroupShuffleConv2d if i % 2 else nn.Conv2d)
    single = graph_of(resnet_cifar(8, width=8))
    mask_groups(single, {x.name: random_grouping(x, 1) for x in layers_of(single)})
    group_convolutions(single, {x.name: random_grouping(x, 1) for x in layers_of(single)})
    assert single.record.edits == ()


# -- more than the specification's facts


@pytest.mark.parametrize("target", ["params=60%", "macs=60%"])
@pytest.mark.parametrize("trim", [False, True])
def test_a_target_is_met(target: str, trim: bool) -> None:
    model = small_resnet()
    graph = ModelGraph(model, (torch.zeros(1, *SHAPE),))
    count = {"params": lambda: params_of(model), "macs": lambda: count_macs(model, (torch.zeros(1, *SHAPE),))[0]}
    cost = count[target.partition("=")[0]]
    before = cost()
    hooks = hooks_on(model, settings(sparsity=None, trim=trim), target)
    hooks.settings.finish(graph, context(evaluate=lambda: None), hooks)
    assert cost() <= 0.6 * before
    if trim:
        assert cost() >= 0.55 * before, "what is above the target is given back"


def test_training_learns_groups() -> None:
    """A strong push makes the kept share of the norm rise, beyond what the order alone gives."""
    pushed, free = small_resnet(), small_resnet()
    shares: list[float] = []
    for model, strength in ((pushed, 0.02), (free, 0.0)):
        method = settings(warmup=0, strength=strength, fit={"epochs": 6})
        hooks = hooks_on(model, method)
        run(model, hooks, method.fit)
        kept = hooks.norms_kept(hooks.learn_orders(model, 20))
        shares.append(float(np.mean([norms[1] / norms[0] for norms in kept.values()])))
    assert shares[0] > shares[1] + 0.1


def test_filters_first_then_groups() -> None:
    """Pruned widths have odd factors: splits by 3 fit them, powers of two don't. `multiple` keeps a common factor."""
    torch.manual_seed(0)
    model = randomise(resnet_cifar(8, width=12)).double()
    graph = ModelGraph(model, (torch.zeros(2, 3, 16, 16, dtype=torch.float64),))
    attach(model, graph.record)
    Magnitude(rate=0.25, residual="coupled", multiple=3).apply(graph, context())
    pruned = params_of(model)
    graph = ModelGraph(model, graph.example)
    with pytest.raises(TersenetError, match="any_divisor"):
        settings(sparsity=0.6).hooks(graph, context())
    method = settings(sparsity=0.6, any_divisor=True)
    hooks = method.hooks(graph, context())
    done = context(evaluate=lambda: None)
    method.finish(graph, done, hooks)
    assert done.equality is not None
    assert done.equality.relative <= 1e-10
    counts = {m.groups for m in model.modules() if isinstance(m, GroupShuffleConv2d)}
    assert any(n % 3 == 0 for n in counts), counts
    assert params_of(model) < 0.6 * pruned


def test_filters_of_independent_blocks_first() -> None:
    """Adapters around the convolutions stay where they are."""
    torch.manual_seed(0)
    model = randomise(resnet_cifar(8, width=12)).double()
    graph = ModelGraph(model, (torch.zeros(2, 3, 16, 16, dtype=torch.float64),))
    attach(model, graph.record)
    Magnitude(rate=0.34, residual="independent", constants="exact").apply(graph, context())
    graph = ModelGraph(model, graph.example)
    hooks = settings(sparsity=0.4).hooks(graph, context())
    groupings = hooks.decide()
    mask_groups(graph, groupings)
    masked = copy.deepcopy(model)
    group_convolutions(graph, groupings)
    assert compare_on(masked, model, (torch.randn(2, 3, 16, 16, dtype=torch.float64),)) <= 1e-10


@pytest.mark.parametrize("fuse", [False, True])
def test_groups_first_then_filters(fuse: bool) -> None:
    """Channels that a gather picks are left whole, with the reason; the others can still go."""
    graph = graph_of(resnet_cifar(8, width=8))
    groupings = {x.name: random_grouping(x, 2) for x in layers_of(graph) if x.name == "layer3.0.conv2"}
    mask_groups(graph, groupings)
    group_convolutions(graph, groupings, fuse)
    before = params_of(graph.model)
    done = context()
    Magnitude(rate=0.5).apply(ModelGraph(graph.model, graph.example), done)
    assert params_of(graph.model) < before
    assert done.equality is not None
    assert done.equality.relative <= 1e-10
    # Fused, no gather is left before it, and half of the channels that its groups read could go.
    conv = graph.model.get_submodule("layer3.0.conv2")
    assert conv.get_parameter("weight").shape[:2] == (32, 8 if fuse else 16)
    assert any("takes channels by their numbers" in note for note in done.notes)


def test_it_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model = randomise(Chain())
    graph = ModelGraph(model, (torch.zeros(2, 3, 8, 8),))
    attach(model, graph.record)
    groupings = {x.name: random_grouping(x, 4, i) for i, x in enumerate(layers_of(graph)) if x.C_out % 4 == 0}
    assert len(groupings) == 2
    mask_groups(graph, groupings)
    group_convolutions(graph, groupings)
    artifact.save(model, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(artifact.load(tmp_path, base=Chain())(x), expected)
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), expected)


def test_layers_that_can_not_be_grouped_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.plain, self.normed = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
            nn.utils.parametrizations.weight_norm(self.normed)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.outside, self.one, self.other = (nn.Conv2d(8, 8, 1) for _ in range(3))
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(self.normed(self.plain(self.stem(x))))
            x = nn.functional.conv2d(x, self.outside.weight)
            return self.other(self.one(x)).mean((2, 3))

    graph = ModelGraph(Net(), (torch.zeros(2, 3, 8, 8),))
    assert [x.name for x in layers_of(graph)] == ["plain"]


def test_what_will_be_refused_is_refused_before_training() -> None:
    """On a copy: the network that is to be trained stays as it is."""
    model = small_resnet()
    graph = ModelGraph(model, (torch.zeros(2, *SHAPE),))
    state = copy.deepcopy(model.state_dict())
    settings(sparsity=0.5).apply(graph, context())
    assert not any(isinstance(m, GroupShuffleConv2d) for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(TersenetError, match="can't be met: it asks for 99"):
        settings(sparsity=0.99).apply(graph, context())


def test_patterns_may_name_a_position() -> None:
    graph = graph_of(resnet_cifar(8, width=8))
    every = [x.name for x in groupable(graph, ("*",), ())[0]]
    assert [x.name for x in groupable(graph, ("*",), ("position:first",))[0]] == every[1:]
    assert [x.name for x in groupable(graph, ("position:last",), ())[0]] == every[-1:]
    with pytest.raises(TersenetError, match="unknown layer"):
        groupable(graph, ("*",), ("nowhere",))


def test_a_refused_grouping_changes_nothing() -> None:
    graph = graph_of(resnet_cifar(8, width=8))
    groupings = {x.name: random_grouping(x, 4, i) for i, x in enumerate(layers_of(graph))}
    before, structure = copy.deepcopy(graph.model.state_dict()), str(graph.model)
    # Not masked: the grouped network computes something else.
    with pytest.raises(TersenetError, match="differs from the masked one"):
        group_convolutions(graph, groupings)
    assert str(graph.model) == structure
    assert graph.record.edits == ()
    assert all(torch.equal(value, before[name]) for name, value in graph.model.state_dict().items())


def test_kernel_norms() -> None:
    weight = torch.tensor([[[[1.0, -2.0]], [[0.5, 0.0]]]])
    assert kernel_norms(weight).tolist() == [[3.0, 0.5]]


def test_a_warmup_that_never_ends_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup \(=4\) must be below"):
        settings(warmup=4)


def test_layers_that_are_left_out_are_named_with_the_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.plain = nn.Conv2d(16, 16, 3, padding=1)
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.normed = weight_norm(nn.Conv2d(16, 16, 1))
            self.odd = nn.Conv2d(16, 9, 1)
            self.unused = nn.Conv2d(16, 16, 1)
            self.head = nn.Conv2d(9, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.plain(torch.relu(self.stem(x))))
            x = torch.relu(self.normed(torch.relu(self.depthwise(x))))
            return self.head(torch.relu(self.odd(x)))

    graph = ModelGraph(Mixed(), (torch.zeros(1, 3, 8, 8),))
    layers, left = groupable(graph, ("*",), ("head",))
    assert [layer.name for layer in layers] == ["stem", "plain", "odd"]
    assert left == {
        "depthwise": "it is grouped already",
        "normed": "it is a ParametrizedConv2d",
        "unused": "it does not run",
        "head": "it is not included",
    }
    assert groupable(graph, ("*",), None)[1]["stem"] == "it reads the network's input"
    with pytest.raises(GraphError, match=r"no layer is left to group \(.*depthwise: it is grouped already"):
        groupable(graph, ("depthwise",), None)
    shown = context()
    settings(sparsity=0.3, exclude=("head",)).preview(graph, shown)
    assert any(note.startswith("stem, odd") and "no level of groups fits it" in note for note in shown.notes)
