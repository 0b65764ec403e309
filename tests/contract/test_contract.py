"""What every method must do on every network, those of other packages included.

A method is picked up by being registered. Its settings are those of SETTINGS, or else its defaults and the shortest
training; a method for which neither is valid fails, until it has a line in SETTINGS.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from graph_support import compare_on, randomise
from tersenet.data.bundle import Data
from tersenet.errors import TersenetError
from tersenet.exporting import artifact
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import Record, attach, record_of
from tersenet.measuring.macs import count_macs, params_of
from tersenet.methods.base import Context, Method, TrainingMethod, all_methods
from tersenet.recipe_target import Target
from tersenet.results import Accuracy
from tersenet.train.loop import fit

CPU = torch.device("cpu")
FIT: dict[str, Any] = {"epochs": 1, "lr": 0.01}

# So that every network has a convolution that can be grouped.
GROUPS: dict[str, Any] = {"fit": FIT, "warmup": 0, "exclude": (), "any_divisor": True, "min_group_width": 1}

# Method -> settings to run on every network.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "magnitude": (
        {"rate": 0.4},
        {"rate": 0.4, "residual": "independent", "score": "fpgm"},
        {"rate": 0.3, "scope": "global", "score": "activation"},
        {"rate": 0.3, "scope": "global", "score": "taylor", "normalise": "lamp", "constants": "zero", "at_least": 2},
    ),
    "soft_filter_pruning": (
        {"fit": FIT, "rate": 0.4},
        {"fit": FIT, "rate": 0.4, "residual": "coupled"},
        {"fit": FIT, "rate": 0.4, "constants": "zero"},
    ),
    # Others in tests/methods: exporting a Winograd layer takes a second.
    "winograd": ({"quantizers": "reference", "tile": 2},),
    "winograd_aware": ({"fit": FIT, "flex": "full"},),
    "winograd_knapsack": ({"bits": (None, 8), "share": 1.0, "calibration_batches": 1},),
    "winas": ({"fit": FIT, "bits": (None, 8), "calibration_batches": 1, "latency_weight": 1.0},),
    "sparse_winograd": (
        {"fit": FIT, "density": 0.4, "others": "native", "move": 0.5},
        {"fit": FIT, "density": 0.3, "scope": "global", "mode": "spatial"},
    ),
    "channel_pruning": (
        {"rate": 0.4},
        {"rate": 0.4, "residual": "independent", "at_least": 2},
        {"rate": 0.3, "select": "max_response", "reconstruct": False},
    ),
    "spatial_decomposition": ({"rate": 0.4}, {"rate": 0.2, "relu": False}),
    "channel_decomposition": ({"rate": 0.4}, {"rate": 0.2, "pointwise": True}),
    "structured_sparsification": (
        {**GROUPS, "sparsity": 0.1},
        {**GROUPS, "sparsity": 0.05, "strength": 1e-3, "gain": 1.0, "trim": True, "fuse": False, "restarts": 1},
    ),
}
# Method -> settings, and a target, that must be refused on the residual network.
REJECTED: dict[str, tuple[tuple[dict[str, Any], str | None], ...]] = {
    "magnitude": (
        ({}, "macs=1%"),
        ({}, None),
        ({"rate": 0.4, "score": "taylor"}, None),
        ({"rate": 0.4, "recalibrate_bn": 1}, None),
        ({"rate": 0.4, "include": ("convolution7",)}, None),
        ({"rate": 0.4, "rates": {"blok*": 0.2}}, None),
        ({"rate": 0.4, "exclude": ("*",)}, None),
    ),
    "soft_filter_pruning": (
        ({"fit": FIT}, "macs=1%"),
        ({"fit": FIT}, None),
        ({"fit": FIT, "rate": 0.4, "include": ("convolution7",)}, None),
        ({"fit": FIT, "rate": 0.4, "rates": {"blok*": 0.2}}, None),
        ({"fit": FIT, "rate": 0.4, "exclude": ("*",)}, None),
    ),
    "winograd": (
        # No images to calibrate with.
        ({}, None),
        ({"bits": None, "include": ("convolution7",)}, None),
        ({"bits": None, "tiles": {"blok*": 2}}, None),
        ({"bits": None, "exclude": ("*",)}, None),
        ({"bits": None, "points": ("0", "1")}, None),
    ),
    "winograd_aware": (
        ({"fit": FIT}, None),
        ({"fit": FIT, "bits": None, "exclude": ("*",)}, None),
    ),
    "winograd_knapsack": (
        # No images to measure on.
        ({"bits": (None, 8)}, None),
        ({"include": ("convolution7",)}, None),
        ({"latency": "nowhere.json"}, None),
    ),
    "winas": (({"fit": FIT, "bits": (None, 8)}, None), ({"fit": FIT, "exclude": ("*",)}, None)),
    "sparse_winograd": (
        ({"fit": FIT, "include": ("convolution7",)}, None),
        ({"fit": FIT, "densities": {"blok*": 0.2}}, None),
        ({"fit": FIT, "exclude": ("*",)}, None),
    ),
    "structured_sparsification": (
        ({**GROUPS, "sparsity": 0.9}, None),
        (GROUPS, "macs=1%"),
        (GROUPS, None),
        ({**GROUPS, "sparsity": 0.1, "include": ("convolution7",)}, None),
        ({**GROUPS, "sparsity": 0.1, "exclude": ("*",)}, None),
        ({**GROUPS, "sparsity": 0.1, "max_groups": 1}, None),
    ),
    "spatial_decomposition": (
        ({}, "macs=1%"),
        ({}, None),
        # No images to calibrate on.
        ({"rate": 0.4}, None),
        ({"rate": 0.4, "include": ("convolution7",)}, None),
        ({"rate": 0.4, "ranks": {"blok*": 2}}, None),
        ({"rate": 0.4, "exclude": ("*",)}, None),
    ),
    "channel_decomposition": (
        ({}, "params=1%"),
        ({}, None),
        ({"rate": 0.4}, None),
        ({"rate": 0.4, "include": ("convolution7",)}, None),
        ({"rate": 0.4, "ranks": {"blok*": 2}}, None),
        ({"rate": 0.4, "exclude": ("*",)}, None),
    ),
    "channel_pruning": (
        ({}, "macs=1%"),
        ({}, None),
        # No images to calibrate on.
        ({"rate": 0.4}, None),
        ({"rate": 0.4, "include": ("convolution7",)}, None),
        ({"rate": 0.4, "rates": {"blok*": 0.2}}, None),
        ({"rate": 0.4, "exclude": ("*",)}, None),
    ),
}
# Method -> networks that have no layer for it.
UNFIT: dict[str, tuple[str, ...]] = {"sparse_winograd": ("depthwise", "grouped")}
# Method -> changes of its settings with which it has nothing to do.
NOTHING: dict[str, dict[str, Any]] = {
    "magnitude": {"rate": 0.0},
    "channel_pruning": {"rate": 0.0},
    "spatial_decomposition": {"rate": 0.0},
    "channel_decomposition": {"rate": 0.0},
    "merge_pointwise": {},
    "fold_batch_norm": {},
    "soft_filter_pruning": {"rate": 0.0},
    "structured_sparsification": {"sparsity": 0.0},
}


def method_of(name: str, variant: int) -> Method:
    cls = all_methods()[name]
    if name in SETTINGS:
        return cls(**SETTINGS[name][variant])
    try:
        return cls(fit=FIT) if "fit" in cls.model_fields and cls.model_fields["fit"].is_required() else cls()
    except ValidationError as error:
        pytest.fail(f"give method {name!r} settings for this test, in SETTINGS of {Path(__file__).name}: {error}")


VARIANTS = [(name, i) for name in all_methods() for i in range(len(SETTINGS.get(name, ({},))))]
every_run = pytest.mark.parametrize(
    ("network", "method", "variant"),
    [(network, name, i) for network in tiny.NETWORKS for name, i in VARIANTS if network not in UNFIT.get(name, ())],
)


def inputs_of(network: str, n: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 8, 8), (1, 8, 8)][: 2 if network == "two_inputs" else 1]
    return tuple(torch.randn(n, *shape, generator=generator) for shape in shapes)


class Batches:
    def __init__(self, network: str, seed: int) -> None:
        self.network, self.seed, self.n = network, seed, 16

    def __len__(self) -> int:
        return 2

    def batches(self, epoch: int) -> Any:
        for number in range(len(self)):
            inputs = inputs_of(self.network, 8, self.seed + number)
            yield inputs if len(inputs) > 1 else inputs[0], torch.arange(8) % tiny.CLASSES


def data_of(network: str) -> Data:
    loaders = [Batches(network, 10 * i) for i in range(1, 4)]
    return Data("noise", *loaders, classes=tiny.CLASSES, shape=(3, 8, 8), normalise=((0.0,) * 3, (1.0,) * 3))


def fresh(network: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(tiny.NETWORKS[network]())


@dataclass
class Done:
    """A method's run. `masked` is the network as it was when its accuracy was measured, before anything was cut."""

    model: nn.Module
    masked: nn.Module
    context: Context
    macs: int

    @property
    def record(self) -> Record:
        record = record_of(self.model)
        assert record is not None
        return record


@cache
def run(network: str, name: str, variant: int) -> Done:
    """The pipeline's own order: graph, apply, hooks, fit, finish."""
    torch.set_num_threads(1)
    model, data, method = fresh(network), data_of(network), method_of(name, variant)
    graph = ModelGraph(model, inputs_of(network))
    attach(model, graph.record)
    seen: list[nn.Module] = []
    context = context_of(graph, data=data)

    def evaluate() -> Accuracy:
        seen.append(copy.deepcopy(model))
        return Accuracy(n=0)

    context.evaluate = evaluate
    method.apply(graph, context)
    predicted = ModelGraph(model, inputs_of(network)).macs()
    if isinstance(method, TrainingMethod):
        hooks = method.hooks(graph, context)
        fit(model, data, method.fit, seed=1, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
        if hasattr(hooks, "kept"):
            predicted = hooks.graph.macs(hooks.kept())
        elif hasattr(hooks, "decide"):
            predicted = hooks.macs(hooks.decide())
        method.finish(graph, context, hooks)
    return Done(model.eval(), seen[-1].eval() if seen else copy.deepcopy(model).eval(), context, predicted)


def context_of(graph: ModelGraph, **more: Any) -> Context:
    return Context(device=CPU, seed=0, original_macs=graph.macs(), original_params=graph.params(), **more)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def modules_of(model: nn.Module) -> dict[str, str]:
    return {name: f"{type(module).__name__}({module.extra_repr()})" for name, module in model.named_modules()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def refusal(call: Callable[[], None]) -> str:
    """Empty if it was not refused; else the reason, as far as it is the expected one, or the whole message."""
    try:
        call()
    except TersenetError as error:
        return "no layer is left" if "no layer is left" in str(error) else str(error)
    return ""


@every_run
def test_compact_equals_masked(network: str, method: str, variant: int) -> None:
    done = run(network, method, variant)
    silenced = any("silenced" in note for note in done.context.notes)
    if done.context.equality is not None:
        assert done.context.equality.relative <= done.context.equality.tolerance
    if not silenced:
        assert compare_on(done.masked, done.model, inputs_of(network, 3, seed=5)) < 1e-5
    else:
        # A padded depthwise convolution, and a layer that is run twice, make something else than a constant.
        asked = method_of(method, variant).model_dump()["constants"] == "zero"
        assert asked or network in ("depthwise", "shared_relu")


@every_run
def test_saved_and_loaded_it_is_the_same(network: str, method: str, variant: int, tmp_path: Path) -> None:
    done = run(network, method, variant)
    artifact.save(done.model, tmp_path)
    loaded = artifact.load(tmp_path, base=tiny.NETWORKS[network]())
    inputs = inputs_of(network, 3, seed=6)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), done.model(*inputs))
    assert record_of(loaded) == done.record


@every_run
def test_the_edits_are_the_whole_structure(network: str, method: str, variant: int) -> None:
    done = run(network, method, variant)
    for device in ("meta", "cpu"):
        with torch.device(device):
            replayed = tiny.NETWORKS[network]()
        for edit in done.record.edits:
            edit.replay(replayed)
        assert shapes_of(replayed) == shapes_of(done.model)
        assert modules_of(replayed) == modules_of(done.model)


@every_run
def test_costs_are_as_predicted(network: str, method: str, variant: int) -> None:
    done = run(network, method, variant)
    measured, uncounted = count_macs(done.model, inputs_of(network, 1))
    assert (measured, uncounted) == (done.macs, [])
    if any(edit.kind == "keep" for edit in done.record.edits):
        assert params_of(done.model) < params_of(fresh(network))
        assert measured < count_macs(fresh(network), inputs_of(network, 1))[0]


@every_run
def test_it_can_be_trained_copied_and_exported(network: str, method: str, variant: int) -> None:
    done = run(network, method, variant)
    model, inputs = copy.deepcopy(done.model), inputs_of(network, 4, seed=7)
    with torch.no_grad():
        expected = done.model(*inputs)
        assert torch.equal(model(*inputs), expected)
    program = torch.export.export(model, inputs, strict=False)
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-5, atol=1e-6)
    model.train()(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("method", "number"), [(name, i) for name, rejected in REJECTED.items() for i in range(len(rejected))]
)
def test_a_rejected_call_changes_nothing(method: str, number: int) -> None:
    settings, target = REJECTED[method][number]
    model = fresh("residual")
    before, structure = state_of(model), modules_of(model)
    graph = ModelGraph(model, inputs_of("residual"))
    context = context_of(graph, target=Target.parse(target) if target else None)
    with pytest.raises(TersenetError):
        all_methods()[method](**settings).apply(graph, context)
    assert_same_state(model, before)
    assert modules_of(model) == structure
    assert graph.record.edits == ()


@pytest.mark.parametrize(("method", "network"), [(name, network) for name in UNFIT for network in UNFIT[name]])
def test_a_network_without_a_layer_for_it_is_refused(method: str, network: str) -> None:
    model = fresh(network)
    before, graph = state_of(model), ModelGraph(model, inputs_of(network))
    with pytest.raises(TersenetError, match=r"no layer is left for .* \(.*: .*\)"):
        method_of(method, 0).apply(graph, context_of(graph))
    assert_same_state(model, before)


@pytest.mark.parametrize(("method", "variant"), VARIANTS)
def test_a_network_with_nothing_to_cut_is_left_alone(method: str, variant: int) -> None:
    torch.manual_seed(0)
    model = tiny.FrozenOnly().eval()
    before = state_of(model)
    graph = ModelGraph(model, inputs_of("plain"))
    # Either there is nothing to do, or the message says why nothing can be done.
    assert refusal(lambda: method_of(method, variant).apply(graph, context_of(graph))) in ("", "no layer is left")
    assert_same_state(model, before)


@pytest.mark.parametrize("method", NOTHING)
@pytest.mark.parametrize("network", tiny.NETWORKS)
def test_with_nothing_to_do_it_does_nothing(network: str, method: str) -> None:
    done = run(network, method, 0)
    model = copy.deepcopy(done.model)
    before, edits = state_of(model), done.record.edits
    graph = ModelGraph(model, inputs_of(network))
    idle = method_of(method, 0).model_copy(update=NOTHING[method])
    # Where the adapters have frozen everything, it says so.
    for act in (idle.apply, idle.preview):
        assert refusal(lambda act=act: act(graph, context_of(graph))) in ("", "no layer is left")
    assert_same_state(model, before)
    record = record_of(model)
    assert record is not None
    assert record.edits == edits


def test_every_table_names_registered_methods() -> None:
    assert (SETTINGS.keys() | REJECTED.keys() | NOTHING.keys() | UNFIT.keys()) <= all_methods().keys()
