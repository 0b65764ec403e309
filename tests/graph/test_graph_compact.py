"""Compaction of networks that nobody wrote by hand, and what happens when something goes wrong in the middle."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import check_exact, random_kept, randomise
from tersenet.errors import GraphError
from tersenet.graph.compact import compact
from tersenet.graph.labels import Residual
from tersenet.graph.model import ModelGraph
from tersenet.graph.proof import compare
from tersenet.measuring.macs import count_macs
from tersenet.models.build import build


class RandomCNN(nn.Module):
    """Layers drawn from a seed: each step takes one or two of the values so far and adds a new one."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)
        self.layers = nn.ModuleDict()
        self.plan: list[tuple[str, tuple[int, ...]]] = []
        widths, sizes = [2], [8]
        for number in range(steps):
            kind, source = (
                str(self.random.choice(self.KINDS)),
                int(self.random.integers(max(0, number - 2), number + 1)),
            )
            if number == 0:
                kind = "conv"
            same = [i for i, s in enumerate(sizes) if s == sizes[source] and i > 0]
            partner = int(self.random.choice(same)) if same else source
            kind, width, size, sources = self._add(str(number), kind, widths, sizes, source, partner)
            self.plan.append((kind, sources))
            widths.append(width)
            sizes.append(size)
        self.flat = bool(self.random.integers(2))
        self.head = nn.Linear(widths[-1] * (sizes[-1] ** 2 if self.flat else 1), 3)

    KINDS = ("conv", "conv", "grouped", "depthwise", "add", "add", "cat", "norm", "pool", "gate", "relu", "strided")

    def _add(
        self, name: str, kind: str, widths: list[int], sizes: list[int], source: int, partner: int
    ) -> tuple[str, int, int, tuple[int, ...]]:
        width, size = widths[source], sizes[source]
        even = width % 2 == 0 and source > 0
        bias = bool(self.random.integers(2))
        if kind == "grouped" and even:
            out = int(self.random.choice([4, 6]))
            self.layers[name] = nn.Conv2d(width, out, 3, padding=1, groups=2, bias=bias)
            return kind, out, size, (source,)
        if kind == "depthwise" and source > 0:
            self.layers[name] = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=bias)
            return kind, width, size, (source,)
        if kind == "add" and source > 0:
            # A block: from the one value to the width of the other, whose sum is taken.
            self.layers[name] = nn.Sequential(
                nn.Conv2d(width, widths[partner], 3, padding=1, bias=bias), nn.BatchNorm2d(widths[partner])
            )
            return kind, widths[partner], size, (source, partner)
        if kind == "cat" and partner != source and source > 0:
            return kind, width + widths[partner], size, (source, partner)
        if kind == "norm" and source > 0:
            self.layers[name] = nn.BatchNorm2d(width)
            return kind, width, size, (source,)
        if kind == "pool" and size > 2 and source > 0:
            return kind, width, size // 2, (source,)
        if kind == "gate" and source > 0:
            self.layers[name] = nn.Conv2d(width, width, 1, bias=bias)
            return kind, width, size, (source,)
        if kind == "relu" and source > 0:
            return kind, width, size, (source,)
        out, kernel = int(self.random.integers(3, 8)), int(self.random.choice([1, 3, 5]))
        stride = 2 if kind == "strided" and size > 2 else 1
        self.layers[name] = nn.Sequential(
            nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=bias), nn.BatchNorm2d(out), nn.ReLU()
        )
        return "conv", out, size // stride, (source,)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, (kind, sources) in enumerate(self.plan):
            x, y = values[sources[0]], values[sources[-1]]
            layer = getattr(self.layers, str(number), None)
            if kind == "add" and layer is not None:
                x = F.relu(y + layer(x))
            elif kind == "cat":
                x = torch.cat((x, y), 1)
            elif kind == "gate" and layer is not None:
                x = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
            elif layer is not None:
                x = layer(x)
            else:
                x = F.max_pool2d(x, 2) if kind == "pool" else F.leaky_relu(x)
            values.append(x)
        x = F.relu(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


def check_random(seed: int, steps: int, rate: float, residual: Residual) -> None:
    torch.manual_seed(seed)
    check_exact(RandomCNN(seed, steps), (torch.zeros(2, 2, 8, 8),), residual, rate, seed=seed)


CASES: dict[str, Any] = {
    "seed": st.integers(0, 10**6),
    "steps": st.integers(2, 9),
    "rate": st.sampled_from([0.2, 0.5, 0.8]),
    "residual": st.sampled_from(["coupled", "independent"]),
}
OPTIONS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "print_blob": True,
}


@settings(max_examples=25, derandomize=True, **OPTIONS)
@given(**CASES)
def test_any_network_is_compacted_exactly(seed: int, steps: int, rate: float, residual: Residual) -> None:
    check_random(seed, steps, rate, residual)


@pytest.mark.slow
@settings(max_examples=300, **OPTIONS)
@given(**CASES)
def test_any_network_is_compacted_exactly_at_length(seed: int, steps: int, rate: float, residual: Residual) -> None:
    check_random(seed, steps, rate, residual)


# -- when something goes wrong


class Fails(nn.Module):
    """Runs with eight channels, and fails in its own way with fewer."""

    def __init__(self, how: type[BaseException]) -> None:
        super().__init__()
        self.a, self.bn, self.z = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.a(x))
        if x.shape[1] != 8:
            raise self.how("only eight will do")
        return self.z(x)


@pytest.mark.parametrize("how", [RuntimeError, KeyError, KeyboardInterrupt])
def test_after_any_failure_the_model_is_as_before(how: type[BaseException]) -> None:
    model = randomise(Fails(how)).train()
    before = copy.deepcopy(model.state_dict())
    graph = ModelGraph(model, (torch.zeros(2, 3, 8, 8),))
    expected = KeyboardInterrupt if how is KeyboardInterrupt else GraphError
    with pytest.raises(expected, match="only eight will do"):
        compact(graph, {"a": np.arange(5)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.a.out_channels == 8
    assert all(module.training for module in model.modules())
    assert graph.record.edits == ()


def test_a_network_that_is_different_with_fewer_channels_is_refused() -> None:
    class Counts(Fails):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.a(x))
            return self.z(x) * torch.tensor(float(x.shape[1]))  # a trial does not look at the values of tensors

    model = randomise(Counts(RuntimeError))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match=r"differs from the masked one by 0\.\d+"):
        compact(ModelGraph(model, (torch.zeros(2, 3, 8, 8),)), {"a": np.arange(5)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Outputs(nn.Module):
    """Gives these tensors, whatever comes."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.outputs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_outputs_that_are_not_finite_are_not_equal(bad: float, place: int) -> None:
    """Python's max() would pass over a NaN behind a number."""
    good, x = Outputs(torch.ones(3), torch.ones(3)), (torch.zeros(2, 3),)
    outputs = [torch.ones(3), torch.ones(3)]
    outputs[place][1] = bad
    with pytest.raises(GraphError, match=r"masked network are not finite .*; nothing was removed"):
        compare(Outputs(*outputs), good, x)
    with pytest.raises(GraphError, match=r"compact network are not finite"):
        compare(good, Outputs(*outputs), x)
    assert compare(good, good, x).max_abs == 0


def test_outputs_that_can_not_be_compared() -> None:
    x = (torch.zeros(2, 3),)
    for empty in (Outputs(), Outputs(torch.ones(0, 4))):
        with pytest.raises(GraphError, match="no tensors"):
            compare(empty, empty, x)
    for other in (Outputs(torch.ones(4)), Outputs(torch.ones(3), torch.ones(3))):
        with pytest.raises(GraphError, match=r"compact network have the shapes .*, the masked one's \[\(3,\)\]"):
            compare(Outputs(torch.ones(3)), other, x)
    mixed = (torch.ones(3), torch.ones(0, 2), torch.tensor([True, False]), torch.tensor([3, 1]))
    assert compare(Outputs(*mixed), Outputs(*mixed), x).max_abs == 0
    flipped = (*mixed[:2], torch.tensor([True, True]), mixed[3])
    assert compare(Outputs(*mixed), Outputs(*flipped), x).max_abs == 1


def test_a_network_with_a_nan_is_not_compacted() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)))
    model[3].weight.data[0, 5] = float("nan")
    with pytest.raises(GraphError, match="masked network are not finite"):
        compact(ModelGraph(model, (torch.zeros(2, 3, 8, 8),)), {"0": np.arange(6)})
    assert model[0].out_channels == 8


def test_biases_of_removed_filters_are_compensated_not_dropped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    nn.init.constant_(model[0].bias, 1.0)
    _, done = check_exact(model, (torch.zeros(2, 3, 8, 8),), constants="exact")
    assert done.zeroed == []


# -- networks of others, with their published weights


@pytest.fixture(scope="module")
def cnn_data(test_data: Path) -> Any:
    """The reference networks beside the data: written by a user, unknown to this package."""
    path = test_data / "cnn_data.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    spec = importlib.util.spec_from_file_location("cnn_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
@pytest.mark.parametrize("residual", ["coupled", "independent"])
@pytest.mark.parametrize("rate", [0.3, 0.5])
@pytest.mark.parametrize(
    "name", ["resnet20", "squeezenet", "fastestdet", "mobilenet_v2_1.0_224_ptq_int8", "mobilenet_v1_0.5_160_uint8"]
)
def test_published_networks_are_compacted_exactly(
    cnn_data: Any, test_data: Path, name: str, rate: float, residual: Residual
) -> None:
    weights, size = test_data / "weights", 96
    if name == "resnet20":
        model, size = cnn_data.load_resnet_cifar(str(weights / "resnet20-12fca82f.th"), 20), 32
    elif name == "squeezenet":
        model = cnn_data.load_squeezenet(str(weights / "compressed_SqueezeNet.net"))
    elif name == "fastestdet":
        model = cnn_data.load_fastestdet(str(weights / "fastestdet_coco_ap05_0.2532.pth"))
    else:
        model, _ = cnn_data.load_mobilenet(str(weights / f"{name}.npz"))
    model = model.double()
    graph = ModelGraph(model, (torch.zeros(1, 3, size, size).double(),), residual)
    before = graph.macs()
    if (name[:12], rate, residual) == ("mobilenet_v2", 0.5, "independent"):
        # Its forward adds what has equal shapes: half of 320 channels are as many as the trunk's 160.
        with pytest.raises(GraphError, match="depends on numbers of channels"):
            compact(graph, random_kept(graph, rate, seed=1))
        assert graph.macs() == before
        return
    done = compact(graph, random_kept(graph, rate, seed=1))
    assert done.equality.relative <= 1e-10
    assert graph.macs() < (0.85 if rate == 0.3 else 0.7) * before


@pytest.mark.parametrize("residual", ["coupled", "independent"])
@pytest.mark.parametrize("name", ["resnet8", "preresnet20", "vgg11_bn_cifar"])
def test_compact_networks_can_be_compacted_again(name: str, residual: Residual) -> None:
    """Adapters from the first time hold taps, which are cut with the channels that they belong to."""
    model = randomise(build(name)).eval()
    for _ in range(3):
        graph = ModelGraph(model, (torch.zeros(2, 3, 32, 32),), residual)
        kept = random_kept(graph, 0.2)
        predicted = graph.macs(kept)
        assert predicted < graph.macs()
        assert compact(graph, kept).equality.relative <= 1e-5
        assert count_macs(model, torch.zeros(1, 3, 32, 32))[0] == predicted
    fresh = build(name)
    for edit in graph.record.edits:
        edit.replay(fresh)
    fresh.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(x), model(x))


def test_constants_before_a_linear_layer_without_bias() -> None:
    net = randomise(
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3, bias=False))
    ).eval()
    graph = ModelGraph(net, (torch.zeros(2, 2, 6, 6),))
    done = compact(graph, {"0": np.arange(3)}, constants="exact")
    assert done.equality.relative <= 1e-5
    assert not done.zeroed
    assert bool((net.get_submodule("4").get_buffer("taps") != 0).any())
