"""Networks that are wrapped, hooked, computed, broken or strange: they work, or are refused with one clear message.

Either way the caller's own network stays as it was, to the bit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import tersenet as tn
from graph_support import check_exact
from run_support import files
from tersenet.errors import TersenetError
from tersenet.ops.rate_schedule import pruned_count

HALF = {"steps": [{"method": "magnitude", "rate": 0.5}]}
SHAPE = (3, 8, 8)
Make = Callable[[], nn.Module]


def net() -> nn.Sequential:
    """Convolutions with and without batch norm, and a head; as after some training, so that constants are there."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    made = nn.Sequential(*layers, nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.normal_(made[1].weight, 1, 0.2)
    nn.init.normal_(made[1].bias)
    return made


def each(change: Callable[[nn.Module], Any], places: tuple[int, ...] = (0, 3, 5)) -> Make:
    """`net` with some convolutions changed, as it is in the middle of training: the last pass had gradients."""

    def make() -> nn.Module:
        made = net()
        for place in places:
            change(made[place])
        made.train()(torch.randn(2, *SHAPE)).sum().backward()
        return made

    return make


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def compiled_in_place() -> nn.Module:
    made = net()
    made.compile(backend="eager")
    return made


def hooked() -> nn.Module:
    made = net()
    made[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    made[3].register_forward_hook(lambda module, inputs, output: output + 1)
    made.register_forward_hook(lambda module, inputs, output: output * 3)
    return made


COMPUTED: dict[str, Make] = {
    "pruned filters": each(lambda layer: prune.ln_structured(layer, "weight", 0.5, n=1, dim=0)),
    "pruned weights": each(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "older weight norm": each(utils.weight_norm),
    "weight norm": each(parametrizations.weight_norm),
}
WORKING: dict[str, Make] = {
    **COMPUTED,
    "one spectral norm": each(parametrizations.spectral_norm, (5,)),
    "one older spectral norm": each(utils.spectral_norm, (5,)),
    "as it is": lambda: net().train(),
    "DataParallel": lambda: nn.DataParallel(net()),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "compiled inside": lambda: Around(torch.compile(net(), backend="eager")),
    "compiled in place": compiled_in_place,
    "hooked": hooked,
    "without convolutions": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)),
}


def snapshot(model: nn.Module) -> list[Any]:
    """All that must not change: tensors, modes, structure and hooks."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = [
        (path, id(module), module.training, tuple(module._forward_hooks.values()), tuple(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ]
    return [state, seen]


def unchanged(model: nn.Module, before: list[Any]) -> bool:
    state, seen = snapshot(model)
    same = all(value.is_meta or torch.equal(value, before[0][name]) for name, value in state.items())
    return same and state.keys() == before[0].keys() and seen == before[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKING)
def test_it_works_and_the_callers_network_stays_as_it_was(tmp_path: Path, name: str) -> None:
    model = WORKING[name]()
    before = snapshot(model)
    result = tn.compress(model, HALF, device="cpu", input_shape=SHAPE)
    assert unchanged(model, before)
    report = result.report
    assert report.after.macs < 0.9 * report.before.macs
    assert sum(p.numel() for p in result.model.parameters()) == report.after.params < report.before.params
    done = report.steps[0].equality
    assert done is not None
    assert done.relative <= done.tolerance
    loaded = tn.load(result.save(tmp_path), base=WORKING[name]())
    x = torch.randn(2, *SHAPE)
    assert torch.equal(loaded(x), result.model.eval()(x))
    if name in ("hooked", "compiled", "older weight norm"):
        assert tn.export(result.model, tmp_path / "net.pt2", x).is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed_are_compacted_exactly(name: str) -> None:
    torch.manual_seed(1)
    check_exact(tn.ModelGraph(COMPUTED[name](), (torch.zeros(2, *SHAPE),)).copy().model, (torch.zeros(2, *SHAPE),))


def test_filters_that_torchs_pruning_masked_are_those_that_go() -> None:
    model = net()
    prune.ln_structured(model[3], "weight", 0.5, n=1, dim=0)
    kept = model[3].weight_mask.flatten(1).any(1)
    assert kept.sum() == 3
    for step in ({"method": "magnitude", "rate": 0.5, "include": ["3"]}, {"method": "remove_zero_filters"}):
        small = tn.compress(model, {"steps": [step]}, device="cpu", input_shape=SHAPE).model
        assert torch.equal(small.get_parameter("3.weight_orig"), model[3].weight_orig[kept])


def test_magnitude_sees_weights_with_their_mask() -> None:
    """Large weights that are masked are worth nothing."""
    model = net()
    with torch.no_grad():
        model[3].weight[0] *= 100
    mask = torch.ones_like(model[3].weight)
    mask[0, 1:] = 0
    mask[0, 0] = 0
    mask[0, 0, 0, 0] = 1e-6
    prune.custom_from_mask(model[3], "weight", mask)
    with torch.no_grad():
        model[3].weight_mask[1:] *= 0.999
    steps = [{"method": "magnitude", "rate": 0.17, "include": ["3"]}]
    small = tn.compress(model, {"steps": steps}, device="cpu", input_shape=SHAPE).model
    assert torch.equal(small.get_parameter("3.bias"), model[3].bias[1:])


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, *, image: Tensor) -> Tensor:
        return self.body(image)


class Two(Around):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x + y)


class LooksAtValues(Around):
    """Every other batch goes another way."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.inner(x)


LINE = inspect.getsourcelines(LooksAtValues.forward)[1] + 1


class Locked(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.lock = threading.Lock()


def poisoned() -> nn.Module:
    made = net()
    with torch.no_grad():
        made[3].weight[0, 0, 0, 0] = float("nan")
    return made


def half_on_meta() -> nn.Module:
    made = net()
    made[5].to("meta")
    return made


REFUSED: dict[str, tuple[Make, str]] = {
    "scripted": (lambda: torch.jit.script(net()), "is a TorchScript module.*pass the nn.Module that it was made from"),
    "traced": (lambda: torch.jit.trace(net(), torch.zeros(1, *SHAPE)), "is a TorchScript module"),
    "scripted inside": (lambda: Around(torch.jit.script(net())), "^inner, .* of Around is a TorchScript module"),
    "empty": (nn.Sequential, "Sequential has no convolution or linear layer"),
    "norms only": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "has no convolution or linear layer"),
    "one layer": (lambda: nn.Conv2d(3, 4, 3), "no layer is left to prune.*the network's output"),
    "on meta": (lambda: net().to("meta"), r"0\.weight, .* and \d+ more of Sequential is on the meta device"),
    "half on meta": (half_on_meta, r"^5\.weight, 5\.bias of Sequential is on the meta device.*load its weights first"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), r"0\.weight.* has no shape yet .*run Sequential on a batch"),
    "NaN": (poisoned, r"^3\.weight of Sequential holds NaN"),
    "by name": (ByName, r"ByName\.forward\(.*image.* it takes image by name only: pass a module"),
    "two inputs": (lambda: Two(net()), r"Two\.forward\(.*missing a required argument: 'y'.*example=\(x, y\)"),
    "values": (lambda: LooksAtValues(net()), rf"\(at test_bad_models\.py:{LINE}\).*torch\.where"),
    "spectral norm": (
        each(parametrizations.spectral_norm),
        r"\. 0, 3, 5: .*remove_parametrizations\(layer, 'weight'\)",
    ),
    "older spectral norm": (
        each(utils.spectral_norm),
        r"\. 0, 3, 5: .*torch\.nn\.utils\.remove_spectral_norm\(layer\)",
    ),
    "orthogonal": (each(parametrizations.orthogonal), r"\. 0, 3, 5: .*remove_parametrizations"),
    "a lock": (lambda: Locked(net()), "Locked can't be copied.*lock.*keep that outside"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line_and_nothing_is_changed(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    lazy = name == "lazy"  # whose tensors have no values that could change
    before = [] if lazy else snapshot(model)
    with pytest.raises(TersenetError, match=message) as caught:
        tn.compress(model, HALF, device="cpu", input_shape=SHAPE, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert lazy or name == "NaN" or unchanged(model, before)
    # A run's folder may have been begun; it holds no network.
    assert not any(path.endswith("safetensors") for path in files(tmp_path))


def test_a_network_on_another_device_than_the_example() -> None:
    with pytest.raises(TersenetError, match="that the network and the example are on one device"):
        _ = tn.ModelGraph(net(), (torch.zeros(2, *SHAPE, device="meta"),)).groups


@given(st.integers(1, 200), st.floats(0, 1, exclude_max=True), st.integers(1, 20))
def test_a_rate_below_1_leaves_a_channel(size: int, rate: float, multiple: int) -> None:
    left = size - pruned_count(size, rate, multiple)
    assert 1 <= left <= size
    assert left == size or left % multiple == 0


def test_the_largest_rates_that_there_are() -> None:
    almost = 0.9999999999999999
    assert [pruned_count(size, almost) for size in (1, 2, 1000)] == [0, 1, 999]
    steps = [{"method": "soft_filter_pruning", "rate": almost, "residual": "coupled", "fit": {"epochs": 1, "lr": 0.01}}]
    small = tn.compress(net(), {"steps": steps}, device="cpu", input_shape=SHAPE, dry_run=True).model
    assert [len(small.get_parameter(f"{place}.weight")) for place in (0, 3, 5)] == [1, 1, 1]
