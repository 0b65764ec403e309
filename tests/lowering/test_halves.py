"""Networks in bfloat16 on AMX's tiles: what stays bfloat16 between layers, and that nothing else changes."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tersenet as tn
from tersenet.kernels.host import Host, host
from tersenet.lowering import assign, contest
from tersenet.lowering.assign import kernels_offered
from tersenet.lowering.halves import HalfConvolution, HalfLinear, has_tiles
from tersenet.lowering.layers import AMX_HALF, Layer
from tersenet.lowering.linears import LinearLayer
from tersenet.lowering.modules import build
from tersenet.lowering.pools import MeanPool
from tersenet.lowering.segments import Segment, _placed  # pyright: ignore[reportPrivateUsage]

needs_amx = pytest.mark.skipif(host().amx_problem is not None, reason=f"AMX: {host().amx_problem}")
HALF = torch.bfloat16


class Mixed(nn.Module):
    """A residual block, a max pool, a concatenation, and results that float32 readers take."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3, stride=2, padding=1)
        self.a, self.b = nn.Conv2d(40, 40, 3, padding=1), nn.Conv2d(40, 40, 3, padding=1)
        self.left, self.right = nn.Conv2d(40, 24, 1), nn.Conv2d(40, 8, 3, padding=1)
        self.last = nn.Conv2d(32, 16, 1)
        self.score = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = torch.cat([self.left(x), self.right(x)], 1)
        y = self.last(x)
        return self.score(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1)), y.sigmoid()


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs_amx
def test_results_stay_narrow_where_all_readers_can_read_them(mixed: nn.Module) -> None:
    fast = tn.lower(mixed, torch.rand(2, 3, 20, 22), choice=AMX_HALF)
    narrow = {layer.name: layer.narrow for layer in fast.report.layers}
    assert all(layer.choice == AMX_HALF for layer in fast.report.layers)
    # `last` is read by the sigmoid, and `score` by the user.
    assert narrow == {
        name: name not in ("last", "score") for name in ("stem", "a", "b", "left", "right", "last", "score")
    }
    for batch in (1, 2, 3):
        x = torch.rand(batch, 3, 20, 22)
        with torch.no_grad():
            for found, expected in zip(fast(x), mixed(x), strict=True):
                assert found.dtype == torch.float32
                assert 1e-5 < error(found, expected) < 2e-2


@needs_amx
def test_one_reader_in_float32_keeps_the_writer_there() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.max_pool2d(self.a(x), 2)
            return self.b(y), y.tanh()

    fast = tn.lower(Two().eval(), torch.rand(1, 16, 12, 12), choice=AMX_HALF)
    assert [layer.narrow for layer in fast.report.layers] == [False, False]


@needs_amx
def test_same_bits_on_any_number_of_threads_and_one_by_one(mixed: nn.Module) -> None:
    fast = tn.lower(mixed, torch.rand(2, 3, 20, 22), choice=AMX_HALF)
    x = torch.rand(2, 3, 20, 22)
    before = torch.get_num_threads()
    with torch.no_grad():
        first = fast(x)  # layer by layer
        again = fast(x)  # in a row
        try:
            torch.set_num_threads(2)
            two = [fast(x), fast(x)]
        finally:
            torch.set_num_threads(before)
    for other in (again, *two):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@needs_amx
def test_results_of_a_pass_are_not_changed_by_the_next(mixed: nn.Module) -> None:
    fast = tn.lower(mixed, torch.rand(1, 3, 20, 22), choice=AMX_HALF)
    inputs = [torch.rand(1, 3, 20, 22) for _ in range(4)]
    with torch.no_grad():
        found = [fast(x) for x in inputs]
        kept = [[y.clone() for y in one] for one in found]
        expected = [mixed(x) for x in inputs]
    for one, copy, exact in zip(found, kept, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, copy, strict=True))
        assert all(error(a, b) < 2e-2 for a, b in zip(one, exact, strict=True))


def test_threads_of_python_at_once(mixed: nn.Module) -> None:
    fast = tn.lower(mixed, torch.rand(1, 3, 20, 22), choice="gemm")
    inputs = [torch.rand(1, 3, 20, 22) for _ in range(4)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                found = fast(inputs[number])
                if not all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)):
                    wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_layers_behind_each_other_are_one_segment(mixed: nn.Module) -> None:
    fast = tn.lower(mixed, torch.rand(1, 3, 20, 22), choice="gemm")
    segments = [module for module in fast.modules() if isinstance(module, Segment)]
    assert [len(segment.layers) for segment in segments] == [6]  # stem, pool, a, b, left, right
    x = torch.rand(1, 3, 20, 22)
    with torch.no_grad():
        expected = mixed(x)
        for _ in range(3):
            assert all(error(a, b) < 1e-5 for a, b in zip(fast(x), expected, strict=True))


def test_whoever_watches_operators_sees_them(mixed: nn.Module) -> None:
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func is torch.ops.aten.convolution.default
            return func(*args, **(kwargs or {}))

    fast = tn.lower(mixed, torch.rand(1, 3, 20, 22), choice="gemm")
    x = torch.rand(1, 3, 20, 22)
    with torch.no_grad():
        fast(x)
        for network in (mixed, fast):
            with Count() as count:
                network(x)
            assert count.seen == 6


def test_without_amx_nothing_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "amx_problem", property(lambda self: "no tiles"))
    monkeypatch.setattr(assign, "compiled", Mock(return_value=None))
    layer = Layer("", torch.randn(8, 8, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, False, "none")
    offered = kernels_offered(True, None, [], [layer])
    assert "F2 half" in offered
    assert AMX_HALF not in offered
    assert not has_tiles()


@needs_amx
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_linear_layer(shape: tuple[int, ...]) -> None:
    layer = LinearLayer("", torch.randn(40, 7), torch.randn(40), "relu")
    module = build(layer, AMX_HALF, shape)
    assert isinstance(module, HalfLinear)
    x = torch.randn(shape)
    expected = F.relu(F.linear(x.bfloat16().double(), layer.weight.bfloat16().double(), layer.bias.double()))  # pyright: ignore
    with torch.no_grad():
        found = module(x)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    watched = module(x)  # gradients are on: plain torch, with the rounded weight
    assert float((watched - expected).norm()) <= 2e-2 * float(expected.norm())


@needs_amx
def test_a_linear_layer_that_convolutions_read_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no kernel of most choices; what it leaves then is read by kernels that know no bfloat16."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32 * 6 * 6), nn.Conv2d(32, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x)).view(-1, 32, 6, 6))

    monkeypatch.setattr(contest, "_SECONDS_OF_LAYERS", 0.05)
    monkeypatch.setattr(contest, "_SECONDS_OF_PASSES", 0.05)
    model, x = Decoder().eval(), torch.randn(2, 16)
    fast = tn.lower(model, x, half=True)
    with torch.no_grad():
        assert error(fast(x), model(x)) < 2e-2


@needs_amx
def test_memory_orders_and_types_that_the_kernel_does_not_take() -> None:
    weight = torch.randn(8, 4, 3, 3)
    layer = Layer("", weight, None, (1, 1), (1, 1), (1, 1), 1, True, "hardswish")
    module = build(layer, AMX_HALF, (1, 4, 9, 9))
    assert isinstance(module, HalfConvolution)
    x, residual = torch.randn(1, 4, 9, 9), torch.randn(1, 8, 9, 9)
    expected = F.hardswish(F.conv2d(x, weight, padding=1) + residual)
    last = torch.channels_last
    with torch.no_grad():
        for a in (x, x.contiguous(memory_format=last), x.to(HALF), x.to(HALF).contiguous(memory_format=last)):
            for b in (residual, residual.to(HALF).contiguous(memory_format=last)):
                assert error(module(a, b.clone()), expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(HALF, marks=needs_amx)])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 7, 7), (3, 70, 5, 1), (2, 3, 1, 1), (2, 1, 9, 4)])
def test_mean_of_images(dtype: torch.dtype, flat: bool, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = MeanPool(flat)(x)
    expected = x.double().mean((2, 3), keepdim=not flat)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert error(found, expected) <= (2**-8 if dtype == HALF else 1e-6)


def test_the_last_pool_and_layer_are_part_of_the_segment() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    choice = AMX_HALF if has_tiles() else "gemm"
    fast = tn.lower(net, torch.rand(2, 3, 9, 9), choice=choice)
    segments = [module for module in fast.modules() if isinstance(module, Segment)]
    assert [len(segment.layers) for segment in segments] == [3 if has_tiles() else 2]
    assert not {"flatten", "adaptive_avg_pool2d"} & fast.report.other.keys()
    with torch.no_grad():
        for batch in (1, 5, 1, 5):
            x = torch.rand(batch, 3, 9, 9)
            assert error(fast(x), net(x)) < 2e-2


def test_memory_is_kept_for_some_sizes_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()
    fast = tn.lower(net, torch.rand(1, 3, 9, 9), choice="gemm")
    (segment,) = (module for module in fast.modules() if isinstance(module, Segment))
    with torch.no_grad():
        for batch in [*range(1, 12), 1]:
            x = torch.rand(batch, 3, 9, 9)
            assert all(error(fast(x), net(x)) < 1e-5 for _ in range(2))
    assert len(segment._plans) <= 8  # pyright: ignore[reportPrivateUsage]


def test_places_do_not_overlap_while_values_live() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lives: dict[int, tuple[int, int, int]] = {}
        for value in range(int(torch.randint(1, 30, (), generator=generator))):
            length, size = (int(torch.randint(1, most, (), generator=generator)) for most in (6, 9))
            lives[value] = (value, value + length, 64 * size)
        places, total = _placed(lives)
        assert places.keys() == lives.keys()
        for a in lives:
            assert 0 <= places[a] <= total - lives[a][2]
            for b in lives:
                together = a < b and lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
                assert not together or places[a] + lives[a][2] <= places[b] or places[b] + lives[b][2] <= places[a]
        assert total <= sum(size for _, _, size in lives.values())
    chain = {value: (value, value + 1, 64) for value in range(10)}
    assert _placed(chain)[1] == 128
