"""`winograd` and `winograd_aware`: facts W9, W10, W13 and W14 of the specification, and what users can get wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import tersenet as tn
from run_support import same
from tersenet.errors import ArtifactError, GraphError, TersenetError, UnknownNameError
from tersenet.exporting import artifact
from tersenet.exporting.deploy import folded, integers, plain_convolutions
from tersenet.graph.convolutions import convolutions
from tersenet.graph.edits import Group, Quantize, Winograd
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import InputSpec, Record, attach, record_of
from tersenet.measuring.winograd_table import winograd_table
from tersenet.methods.base import Context
from tersenet.methods.magnitude import Magnitude
from tersenet.methods.remove_zero_filters import RemoveZeroFilters
from tersenet.methods.winograd_aware import WinogradAware, WinogradSwap, WinogradTraining
from tersenet.models.build import build
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d, calibration
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.nn.winograd_settings import Quantization, Quantizer, WinogradSettings
from tersenet.train.hooks import TrainState
from tersenet.train.loop import fit
from tersenet.train.optim import make_optimizer, set_lr
from tersenet.train.settings import Fit, lr_at

CPU = torch.device("cpu")
FIT: dict[str, Any] = {"epochs": 1, "lr": 0.02}


class Net(nn.Module):
    """One convolution of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.five = nn.Conv2d(8, 8, 5, padding=2, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.stride = nn.Conv2d(8, 8, 3, 2, 1)
        self.small = nn.Conv2d(8, 8, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.plain, self.five, self.point, self.depth, self.wide, self.stride, self.small):
            x = self.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Batches:
    n = 16

    def __len__(self) -> int:
        return 2

    def batches(self, epoch: int) -> Any:
        labels = torch.arange(8) % 10
        return iter([(IMAGES[:8], labels), (IMAGES[8:], labels)])


def data() -> Any:
    from tersenet.data.bundle import Data

    return Data("noise", Batches(), Batches(), Batches(), classes=10, shape=(1, 8, 8), normalise=((0.0,), (1.0,)))


def swapped(model: nn.Module, images: Tensor = IMAGES, **settings: Any) -> tuple[ModelGraph, Context]:
    graph = ModelGraph(model, (images[:2],))
    attach(model, graph.record)
    context = Context(CPU, 0, data=data())
    WinogradSwap(**settings).apply(graph, context)
    return graph, context


def edits(graph: ModelGraph) -> dict[str, Winograd | Quantize]:
    return {edit.module: edit for edit in graph.record.edits if isinstance(edit, (Winograd, Quantize))}


def test_every_convolution_is_swapped_quantized_or_left_with_a_reason() -> None:
    graph, context = swapped(net(), tile=4)
    done = edits(graph)
    tiles = {name: edit.settings.tile for name, edit in done.items() if isinstance(edit, Winograd)}
    # The map of `small` is 4x4 behind the stride.
    assert tiles == {"plain": 4, "five": 4, "small": 4}
    assert {name for name, edit in done.items() if isinstance(edit, Quantize)} == {"point", "depth", "wide", "stride"}
    notes = "\n".join(context.notes)
    for reason in (
        "point quantized as direct: 1x1",
        "depth quantized as direct: depthwise",
        "wide quantized as direct: its kernel 1x3 is not square",
        "stride quantized as direct: strided",
        "stem left as is: left out by include or exclude",
        "unused left as is: it does not run",
        "the quantizers' ranges, from 16 training images",
    ):
        assert reason in notes
    assert type(graph.model.get_submodule("stem")) is nn.Conv2d


def test_tiles_by_pattern_automatic_and_on_small_maps() -> None:
    def tiles(**settings: Any) -> dict[str, int]:
        graph, _ = swapped(net(), bits=settings.pop("bits", None), exclude=(), **settings)
        return {name: edit.settings.tile for name, edit in edits(graph).items() if isinstance(edit, Winograd)}

    assert tiles(tile=6) == {"stem": 6, "plain": 6, "five": 6, "small": 4}
    assert tiles(tile=2, tiles={"f*": 4, "position:first": 6}) == {"stem": 6, "plain": 2, "five": 4, "small": 2}
    # Of an 8x8 map F6 takes four tiles of 64 products, F4 four of 36; of one of 5 in 5x5, of 6x6 taps.
    assert tiles(tile="auto") == {"stem": 4, "plain": 4, "five": 4, "small": 4}
    assert tiles(tile=4, strided=True)["stride"] == 4
    assert tiles(tile=2, include=("pl*",)) == {"plain": 2}
    with pytest.raises(TersenetError, match=r"tile 6 for small is larger than its map of 4x4: .*at most 4"):
        tiles(tiles={"small": 6})


def test_automatic_tiles_have_the_fewest_products() -> None:
    for side, float_tile, coarse in ((12, 6, 4), (8, 4, 4), (2, 2, 2)):
        for bits, expected in ((None, float_tile), (8, coarse), (16, float_tile)):
            model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)).eval()
            images = torch.zeros(2, 1, side, side)
            found = convolutions(ModelGraph(model, (images,)))[0][1]
            products = {m: found.multiplications(m) for m in (2, 4, 6) if m <= side and (bits != 8 or m < 6)}
            assert products[expected] == min(products.values())
            settings = WinogradSwap(tile="auto", bits=bits)
            (edit,) = settings.plan(ModelGraph(model, (images,)), settings.quantization).edits
            assert isinstance(edit, Winograd)
            assert edit.settings.tile == expected
    strided = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1)).eval()
    found = convolutions(ModelGraph(strided, (torch.zeros(1, 4, 16, 16),)))[0][0]
    # 6.25 products per output in place of 9.
    assert found.multiplications(4) / found.multiplications() == pytest.approx(6.25 / 9)


@pytest.mark.parametrize(("tile", "tolerance"), [(2, 1e-5), (4, 1e-4), (6, 1e-4)])
@pytest.mark.parametrize("flex", ["static", "full", "diagonal", "points"])
def test_in_floating_point_the_output_is_the_original_network_s(tile: int, tolerance: float, flex: str) -> None:
    """W10: adaptation starts from what was trained, and says what is fresh."""
    original = net()
    expected, weights = original(IMAGES), dict(original.named_parameters())
    graph, context = swapped(original, tile=tile, bits=None, flex=flex, exclude=(), strided=True)
    found = graph.model(IMAGES)
    assert float(((found - expected).norm() / expected.norm()).detach()) < tolerance
    now = dict(graph.model.named_parameters())
    # The very parameters.
    assert all(now[name] is weight for name, weight in weights.items())
    assert any("kept as they were" in note for note in context.notes)
    assert any("fresh: the transforms of 5 layers" in note for note in context.notes) is (flex != "static")


def test_the_paper_s_network_has_the_published_counts() -> None:
    """W9: 16 layers, parameters, trainable ones, F6's last stage."""
    images = torch.zeros(1, 3, 32, 32)

    model = build("winograd_resnet18", width=32).eval()
    swapped(model, images, bits=None, flex="full", tile=4)
    flexible = winograd_table(model, (images,))
    assert flexible is not None
    assert (flexible.in_table, flexible.parameters) == (2_792_800, 2_798_858)
    assert sum(row.winograd == "F(4x4, 3x3)" for row in flexible.rows) == 16
    first = flexible.rows[0]
    assert (first.name, first.winograd, first.bits) == ("conv1.weight", None, None)
    last = [row for row in flexible.rows if row.name.startswith("layer4") and row.winograd]
    assert {row.input_shape[2:] for row in last} == {(4, 4)}
    model = build("winograd_resnet18", width=32).eval()
    graph, _ = swapped(model, images, bits=None, flex="static", tile=6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_797_610
    tiles = {name: edit.settings.tile for name, edit in edits(graph).items() if isinstance(edit, Winograd)}
    assert tiles == {name: 4 if name.startswith("layer4") else 6 for name in tiles}
    assert len(tiles) == 16


def test_the_first_layer_and_the_linear_one_carry_no_quantizer() -> None:
    """W9."""
    graph, _ = swapped(net(), quantizers="reference")
    quantized = {name.partition(".quantizers")[0] for name in graph.model.state_dict() if name.endswith(".range")}
    assert {name.partition(".transforms")[0] for name in quantized} == set(edits(graph))
    assert not {"stem", "fc"} & set(edits(graph))


@pytest.mark.parametrize(
    "settings",
    [
        {"quantizers": "reference", "flex": "full"},
        {"scale": "learned", "product_bits": 10, "power_of_two": True, "tile": 2},
        {"tile": "direct"},
    ],
)
def test_trained_saved_and_loaded_it_is_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model = net()
    graph = ModelGraph(model, (IMAGES[:2],))
    attach(model, graph.record)
    method, context = WinogradAware(fit=Fit(**FIT), **settings), Context(CPU, 0, data=data())
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    fit(model, data(), method.fit, seed=1, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
    method.finish(graph, context, hooks)
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path, base=Net())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        state = copy.deepcopy(loaded.state_dict())
        loaded(3 * IMAGES)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state.items())
    assert record_of(loaded) == graph.record


def test_another_tile_or_other_bits_in_the_file_are_one_clear_error(tmp_path: Path) -> None:
    model = net()
    swapped(model, tile=4)
    artifact.save(model, tmp_path)
    text = (tmp_path / "model.json").read_text()

    def refusal(**changes: Any) -> str:
        manifest = json.loads(text)
        settings = next(edit["settings"] for edit in manifest["record"]["edits"] if edit["kind"] == "winograd")
        for key, value in changes.items():
            settings[key] = value
        manifest["record_sha256"] = None
        (tmp_path / "model.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError) as raised:
            artifact.load(tmp_path, base=Net())
        return str(raised.value)

    assert "plain.quantizers.input_winograd.range has shape (2, 36, 1, 1, 1) in place of (2, 16" in refusal(tile=2)
    assert "plain.quantizers.input.range is unexpected" in refusal(quantization=None)
    assert "less than or equal to 8" in refusal(tile=1000)
    assert "points" in refusal(points=["1e999999999"] * 5)
    assert "points" in refusal(points=["1"] * 500)
    assert "unknown point set" in refusal(points="nowhere").lower()


def test_an_edit_swaps_a_plain_convolution_only() -> None:
    model = net()
    for name in ("fc", "relu", ""):
        with pytest.raises(GraphError, match=r"must be an nn\.Conv2d inside"):
            Winograd(module=name, settings=WinogradSettings()).replay(model)
    Winograd(module="plain", settings=WinogradSettings()).replay(model)
    with pytest.raises(GraphError, match="swaps 'plain', a WinogradConv2d"):
        Winograd(module="plain", settings=WinogradSettings()).replay(model)
    with pytest.raises(TersenetError, match="quantizes input, weight, output, not"):
        Quantize(module="five", quantization=Quantization(product=Quantizer(bits=8))).replay(model)


def test_a_layer_under_two_names_stays_one() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1))
    model.append(model[1])
    swapped(model.eval(), bits=None)
    assert isinstance(model[1], WinogradConv2d)
    assert model[1] is model[2]


def test_a_second_application_finds_nothing_to_do() -> None:
    graph, _ = swapped(net(), others="float")
    before = graph.record
    with pytest.raises(TersenetError, match=r"no layer is left.*plain, five, small: it is a Winograd"):
        WinogradSwap(others="float").apply(graph, Context(CPU, 0, data=data()))
    assert graph.record == before


def test_pruning_before_the_swap() -> None:
    model = net()
    graph = ModelGraph(model, (IMAGES[:2],))
    context = Context(CPU, 0, original_macs=graph.macs(), original_params=graph.params(), data=data())
    Magnitude(rate=0.5).apply(graph, context)
    narrow = graph.macs()
    WinogradSwap().apply(graph, context)
    assert edits(graph).keys() >= {"plain", "small"}
    # Costs are those of the convolutions, whatever computes them.
    assert graph.macs() == narrow


@pytest.mark.parametrize("settings", [{}, {"quantizers": "reference", "flex": "full"}, {"bits": None, "strided": True}])
def test_pruning_behind_the_swap_removes_the_same_channels(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, model = net(), net()
    before = ModelGraph(plain, (IMAGES[:2],))
    context = Context(CPU, 0, original_macs=before.macs(), original_params=before.params(), data=data())
    Magnitude(rate=0.5).apply(before, context)
    graph, _ = swapped(model, **settings)
    context = Context(CPU, 0, original_macs=graph.macs(), original_params=graph.params(), data=data())
    Magnitude(rate=0.5).apply(graph, context)
    assert context.equality is not None
    assert context.equality.relative <= context.equality.tolerance
    assert graph.macs() == before.macs()
    kept = {n: m.weight.shape for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} == kept
    layer = model.get_submodule("plain")
    assert isinstance(layer, WinogradConv2d)
    assert (layer.in_channels, layer.out_channels) == kept["plain"][1::-1]
    # What is left of a quantized network computes what the swapped narrow one does, but for its ranges.
    with torch.no_grad():
        found = model(IMAGES)
        assert found.isfinite().all()
        if not settings.get("bits", 8):
            torch.testing.assert_close(found, plain(IMAGES), rtol=1e-3, atol=1e-4)
    artifact.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(artifact.load(tmp_path, base=Net())(IMAGES), found)


def test_zeroed_filters_of_a_quantized_network_can_be_cut_exactly() -> None:
    """Zeros stay zeros through every quantizer."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    model.extend([nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)])
    with torch.no_grad():
        model[1].weight[2:5] = 0  # pyright: ignore
    graph, context = swapped(model.eval(), tile=4)
    with torch.no_grad():
        expected = model(IMAGES)
    context.original_macs, context.original_params = graph.macs(), graph.params()
    RemoveZeroFilters().apply(graph, context)
    assert model[1].weight.shape[0] == 5  # pyright: ignore
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"bits": None}, {}, {"tile": "direct"}])
def test_grouped_and_shuffled_layers_are_swapped_too(settings: dict[str, Any], tmp_path: Path) -> None:
    """Structured sparsification first, Winograd behind it: the order of channels stays around the layer."""
    model = net()
    graph = ModelGraph(model, (IMAGES[:2],))
    attach(model, graph.record)
    order, other = (3, 1, 0, 2, 7, 5, 4, 6), (0, 2, 4, 6, 1, 3, 5, 7)
    for name in ("plain", "point"):
        graph.apply(Group(module=name, groups=2, rows=order, columns=other))
    with torch.no_grad():
        expected = model(IMAGES)
    swapped(model, **settings)
    layer = model.get_submodule("plain")
    assert isinstance(layer, QuantizedConv2d if settings.get("tile") == "direct" else WinogradConv2d)
    assert layer.groups == 2
    assert layer.gather is not None
    with torch.no_grad():
        found = model(IMAGES)
        error = float((found - expected).norm() / expected.norm())
        assert error < (1e-4 if "bits" in settings else 0.3)
        assert torch.equal(folded(model)(IMAGES), found) or "bits" in settings
        torch.testing.assert_close(plain_convolutions(model)(IMAGES), expected, rtol=1e-4, atol=1e-5)
        if "bits" not in settings:
            whole = integers(model)(IMAGES)
            assert float((whole - found).norm() / found.norm()) < 0.1
    artifact.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(artifact.load(tmp_path, base=Net())(IMAGES), found)


def test_scales_per_channel_freeze() -> None:
    model = net()
    graph = ModelGraph(model, (IMAGES[:2],))
    tapwise = Quantization.tapwise(8)
    per_channel = Quantizer(bits=8, per="tap_channel")
    settings = WinogradSettings(quantization=tapwise.model_copy(update={"weight_winograd": per_channel}))
    graph.apply(Winograd(module="plain", settings=settings))
    context = Context(CPU, 0, original_macs=graph.macs(), original_params=graph.params(), data=data())
    with pytest.raises(
        GraphError, match="plain has weights of the Winograd domain, masks, or scales per channel: prune"
    ):
        Magnitude(rate=0.5).apply(graph, context)


class Strange(nn.Conv2d):
    """A user's own kind of convolution."""


def test_convolutions_of_other_kinds_stay() -> None:
    layers = [nn.Conv2d(1, 4, 3), Strange(4, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))]
    model = nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=9), nn.Conv2d(4, 4, 9)).eval()
    _, context = swapped(model, bits=None)
    notes = "\n".join(context.notes)
    assert "1 left as is: it is a Strange" in notes
    assert "2 left as is: it is a ParametrizedConv2d" in notes
    assert "4 left as is: its kernel 9x9 is above 7x7" in notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 40}, "less than or equal to 32"),
        ({"tile": 1}, "greater than or equal to 2"),
        ({"tile": "direct", "bits": None}, "`direct` without bits"),
        ({"product_bits": 10, "quantizers": "reference"}, "need `quantizers: tapwise`"),
        ({"power_of_two": True, "bits": None}, "need `quantizers: tapwise` and bits"),
        ({"points": "1e9"}, "unknown point set '1e9'"),
        ({"tiles": {"nowhere": 2}}, "unknown layer 'nowhere'"),
        ({"include": ("type:cnv",)}, "unknown kind of layer"),
        ({"points": ("0", "1", "-1", "9999999", "-9999999"), "include": ("plain",)}, "plain by .* all but singular"),
        ({"points": ("0", "1", "1", "2", "3"), "include": ("plain",)}, "plain by F\\(4, 3\\)"),
    ],
)
def test_bad_settings_name_themselves_and_change_nothing(settings: dict[str, Any], message: str | None) -> None:
    model = net()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises((TersenetError, ValidationError, UnknownNameError), match=message):
        swapped(model, **settings)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_patterns_may_name_a_type_or_a_position() -> None:
    def tiles(**settings: Any) -> dict[str, int]:
        graph, _ = swapped(net(), bits=None, others="float", **settings)
        return {name: edit.settings.tile for name, edit in edits(graph).items() if isinstance(edit, Winograd)}

    assert tiles(exclude=("type:grouped",)) == {"stem": 4, "plain": 4, "small": 4}
    assert tiles(include=("type:grouped", "position:last")) == {"five": 4, "small": 4}
    assert tiles(tiles={"type:grouped": 2}) == {"plain": 4, "five": 2, "small": 4}


def test_a_stride_as_large_as_the_filter_leaves_nothing_to_save() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1)).eval()
    _, context = swapped(model, bits=None, exclude=(), strided=True)
    assert type(model[0]) is nn.Conv2d
    assert any("0 left as is: its stride leaves one tap" in note for note in context.notes)


@pytest.mark.parametrize(
    ("stride", "dilation", "sides"), [(1, 2, (4, 4)), (2, 2, (4, 4)), (2, 3, (4, 4)), (1, 1, (8, 8))]
)
def test_a_dilation_s_phases_are_maps_of_their_own(stride: int, dilation: int, sides: tuple[int, int]) -> None:
    """But a stride that divides the dilation has taken the other phases away already."""
    conv = nn.Conv2d(1, 4, 3, stride, dilation, dilation)
    (found,), _ = convolutions(ModelGraph(nn.Sequential(conv).eval(), (IMAGES[:2],)))
    assert found.sides == sides


def test_a_layer_on_several_maps_is_planned_by_the_largest() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            small = self.head(nn.functional.max_pool2d(x, 4))
            return small.mean((2, 3)) + self.head(x).mean((2, 3))

    (found,), _ = convolutions(ModelGraph(Pyramid().eval(), (IMAGES[:2],)))
    assert (found.sides, found.others) == ((8, 8), ((2, 4, 2, 2),))
    # Four tiles of the large map, and one of the small one.
    assert found.multiplications(4) == 5 * 36 * 4
    assert found.multiplications() == (64 + 4) * 9 * 4
    model = Pyramid().eval()
    expected = model(IMAGES)
    swapped(model, exclude=(), bits=None)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_layers_that_are_called_by_name_are_found() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    (found,), _ = convolutions(ModelGraph(Named().eval(), (IMAGES[:2],)))
    assert (found.name, found.outputs) == ("conv", (2, 4, 6, 6))


def test_ranges_of_broken_images_are_refused() -> None:
    images = IMAGES.clone()
    images[3] = float("nan")

    class Broken(Batches):
        def batches(self, epoch: int) -> Any:
            return iter([(images, torch.zeros(16, dtype=torch.long))])

    broken = dataclasses.replace(data(), train=Broken())
    with pytest.raises(TersenetError, match=r"plain: the range of the input is .*look for NaN"):
        WinogradSwap().apply(ModelGraph(net(), (IMAGES[:2],)), Context(CPU, 0, data=broken))


def test_fewer_images_than_a_batch_are_none() -> None:
    class Empty(Batches):
        def __len__(self) -> int:
            return 0

    empty = dataclasses.replace(data(), train=Empty())
    model = net()
    with pytest.raises(TersenetError, match="at least a batch"):
        WinogradSwap().apply(ModelGraph(model, (IMAGES[:2],)), Context(CPU, 0, data=empty))
    assert type(model.get_submodule("plain")) is nn.Conv2d


def test_before_training_ranges_are_those_of_batch_statistics() -> None:
    """A network that was never trained has running statistics that say nothing."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 10)).eval()
    with torch.no_grad():
        model[0].weight.mul_(0.05)  # pyright: ignore
    largest: dict[str, float] = {}
    for method in (WinogradSwap(), WinogradAware(fit=Fit(**FIT))):
        own = copy.deepcopy(model)
        graph = ModelGraph(own, (IMAGES[:2],))
        method.apply(graph, Context(CPU, 0, data=data()))
        largest[method.method] = float(own[2].quantizers["input"].range.abs().max())  # pyright: ignore
        assert all(torch.equal(b, own[1].get_buffer(n)) for n, b in model[1].named_buffers())  # pyright: ignore
        assert not own[1].training  # pyright: ignore
    assert largest["winograd"] < 0.3
    assert largest["winograd_aware"] > 1


def test_a_swap_draws_no_random_numbers() -> None:
    model = net()
    before = torch.get_rng_state()
    Winograd(module="plain", settings=WinogradSettings()).replay(model)
    Quantize(module="point", quantization=Quantization(input=Quantizer(bits=8))).replay(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bits", [8, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_rounded_in_float32(dtype: torch.dtype, bits: int) -> None:
    """In float16 the scale of a tensor of zeros would be zero, and levels above 65504 infinite."""
    for x in (torch.zeros(1, 2, 3, 3), IMAGES[:2], 1e-4 * IMAGES[:2]):
        quantizer = FakeQuantizer(Quantizer(bits=bits), (1, 1, 1, 1), "input").train()
        low = x.to(dtype)
        y = quantizer(low)
        step = 2 * low.float().abs().max() / (2**bits - 1)
        assert y.dtype is dtype
        # Half a step, at the top a whole one, and the rounding of the result.
        assert (y.float() - low.float()).abs().max() <= step + torch.finfo(dtype).eps * low.float().abs().max()


def test_a_range_of_infinity_in_a_file_is_refused() -> None:
    quantizer = FakeQuantizer(Quantizer(bits=8), (1, 1, 1, 1), "input")
    state = quantizer.state_dict()
    quantizer.load_state_dict(state)
    assert not quantizer.seen
    for values in ((float("-inf"), float("inf")), (float("nan"), 1.0)):
        state["range"] = torch.tensor(values).view(2, 1, 1, 1, 1)
        with pytest.raises(TersenetError, match="NaN or inf"):
            quantizer.load_state_dict(state)


def test_without_images_quantizers_are_refused_before_anything_changes() -> None:
    model = net()
    with pytest.raises(TersenetError, match=r"winograd takes the quantizers' ranges from .*`bits: null`"):
        WinogradSwap().apply(ModelGraph(model, (IMAGES[:2],)), Context(CPU, 0))
    assert not any(isinstance(m, WinogradConv2d) for m in model.modules())


def test_transforms_and_scales_have_no_weight_decay_and_a_rate_of_their_own() -> None:
    model = net()
    swapped(model, flex="full", scale="learned")
    for name in ("sgd", "adam", "adamw"):
        optimizer = make_optimizer(model, Fit(epochs=1, optimizer=name, weight_decay=0.1))
        own = next(group for group in optimizer.param_groups if group.get("name") == "undecayed")
        names = {id(p): n for n, p in model.named_parameters()}
        found = {names[id(p)].rpartition(".")[2] for p in own["params"]}
        assert (own["weight_decay"], found) == (0.0, {"at", "g", "bt", "log2_scale"})
        own["lr_factor"] = 0.5
        set_lr(optimizer, 0.2)
        assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert len(make_optimizer(net(), Fit(epochs=1)).param_groups) == 1


def test_the_learning_rate_falls_at_any_number_of_epochs() -> None:
    """W13. That every test image counts is in tests/train/test_evaluate.py."""
    for epochs in (5, 7, 12):
        fitting = Fit(epochs=epochs, schedule="step", milestones=(epochs * 3 // 5, epochs * 4 // 5), lr=1.0)
        rates = [lr_at(fitting, epoch, 0, 1) for epoch in range(epochs)]
        assert sorted({round(rate, 6) for rate in rates}) == [0.01, 0.1, 1.0]


def recipe(**more: Any) -> dict[str, Any]:
    step = {"method": "winograd_aware", "fit": {"epochs": 2, "lr": 0.02, "ema": 0.9}, "flex": "full", "bits": 8, **more}
    source = {"source": "digits", "batch_size": 32, "train_limit": 64}
    arguments = {"width": 4, "in_channels": 1}
    return {"name": "tiny", "model": "resnet8", "model_arguments": arguments, "data": source, "steps": [step]}


class Stopped(Exception):
    pass


class StoppedTraining(WinogradTraining):
    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        if state.epoch == 1:
            raise Stopped
        return super().after_epoch(state)


@pytest.mark.parametrize("scale", ["range", "learned"])
def test_an_interrupted_adaptation_goes_on_bit_exactly(scale: Any, tmp_path: Path) -> None:
    """W10: optimizer, learning rate, transforms, scales and observers."""
    settings = Fit(epochs=3, lr=0.02, ema=0.9, schedule="cosine")
    method = WinogradAware(fit=settings, flex="full", scale=scale, transforms_lr=0.5)

    def adapted(checkpoint: Path | None, stop: bool = False) -> tuple[nn.Module, list[dict[str, Any]]]:
        graph = ModelGraph(net(), (IMAGES[:2],))
        context = Context(CPU, 0, data=data())
        method.apply(graph, context)
        hooks: WinogradTraining = (StoppedTraining if stop else WinogradTraining)(method.transforms_lr)
        run: dict[str, Any] = {"seed": 1, "device": CPU, "hooks": hooks, "checkpoint": checkpoint}
        rows = fit(graph.model, data(), settings, log=lambda row: None, **run)
        return graph.model, [{**row, "seconds": 0} for row in rows]

    whole, rows = adapted(None)
    with pytest.raises(Stopped):
        adapted(tmp_path / "checkpoint.pt", stop=True)
    resumed, again = adapted(tmp_path / "checkpoint.pt")
    assert rows == again
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    with torch.no_grad():
        assert torch.equal(whole(IMAGES), resumed(IMAGES))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_exactly(tmp_path: Path) -> None:
    whole = tn.compress(None, recipe(), out=tmp_path / "whole", device="cpu")

    def stop(event: dict[str, Any]) -> None:
        epochs.extend([event] if event["event"] == "epoch" else [])
        if epochs:
            raise Stopped

    epochs: list[dict[str, Any]] = []
    with pytest.raises(Stopped):
        tn.compress(None, recipe(), out=tmp_path / "cut", device="cpu", on_event=stop)
    assert list((tmp_path / "cut").rglob("checkpoint.pt"))
    resumed = tn.compress(None, recipe(), out=tmp_path / "cut", device="cpu")
    assert same(whole.model, resumed.model)
    assert whole.report.after.top1 == resumed.report.after.top1
    with pytest.raises(TersenetError):
        tn.compress(None, recipe(bits=10), out=tmp_path / "cut", device="cpu")
    loaded = tn.load(tmp_path / "cut" / "model")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), resumed.model.cpu()(x))


def test_a_dry_run_reads_no_image(tmp_path: Path) -> None:
    result = tn.compress(None, recipe(), dry_run=True)
    assert any(isinstance(module, WinogradConv2d) for module in result.model.modules())
    assert not any(isinstance(module, QuantizedConv2d) for module in result.model.modules())
    assert any("layers by F4" in note for note in result.report.steps[0].notes)
    assert result.report.after.macs == result.report.before.macs


@pytest.mark.slow
def test_a_whole_network_is_one_graph() -> None:
    """W14: compiled without a break, and exported."""
    torch.compiler.reset()
    graph, _ = swapped(net(), flex="full")
    with torch.no_grad():
        expected = graph.model(IMAGES)
        compiled = torch.compile(graph.model, fullgraph=True, backend="aot_eager")(IMAGES)
        exported = torch.export.export(graph.model, (IMAGES,)).module()(IMAGES)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    """W14."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)).eval()
    swapped(model, tile=2, exclude=())
    attach(model, Record(base=None, input=InputSpec(shape=(1, 8, 8))))
    with torch.no_grad():
        expected = model(IMAGES[:2])
    tn.export(model, tmp_path / "net.onnx", IMAGES[:2])
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:2].numpy()})
    # One level of eight bits, where a value lies on the border of two.
    step = float(expected.abs().max()) / 127
    assert float((torch.from_numpy(found) - expected).abs().max()) <= 1.01 * step
    assert float((torch.from_numpy(found) - expected).abs().mean()) < 0.02 * step


def test_in_place_operators_may_follow_a_winograd_layer() -> None:
    for order in (torch.contiguous_format, torch.channels_last):
        layer = WinogradConv2d(2, 4, 3, padding=1, settings=WinogradSettings())
        y = layer(IMAGES.view(8, 2, 8, 8).contiguous(memory_format=order))
        torch.relu_(y).sum().backward()
        assert layer.weight.grad is not None
        assert y.is_contiguous(memory_format=order)


def test_a_quantized_convolution_rounds_input_weight_and_output() -> None:
    conv = nn.Conv2d(1, 4, 3, padding=1)
    one = Quantizer(bits=4)
    layer = QuantizedConv2d.from_conv(conv, Quantization(input=one, weight=one, output=one))
    with pytest.raises(TersenetError, match="has no range yet"):
        layer.eval()(IMAGES)
    with torch.no_grad(), calibration(layer):
        layer(IMAGES)
    y = layer(IMAGES)
    assert len(y.unique()) <= 16
    exact = conv(IMAGES)
    assert 0.01 < float(((y - exact).norm() / exact.norm()).detach()) < 0.3
    y.sum().backward()
    assert conv.weight.grad is not None
    layer.get_buffer("quantizers.input.range").fill_(float("inf"))
    with pytest.raises(TersenetError, match="stem: the range of the input"):
        layer.check("stem")


def test_quantizers_bear_a_change_of_memory_order() -> None:
    graph, _ = swapped(net())
    with torch.no_grad():
        expected = graph.model(IMAGES)
        found = graph.model.to(memory_format=torch.channels_last)(IMAGES)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_measure_prints_the_reference_s_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tersenet.cli.main import main

    model = build("resnet8", width=4).eval()
    attach(model, Record(base="resnet8", arguments={"width": 4}, input=InputSpec(shape=(3, 32, 32))))
    graph, _ = swapped(model, torch.zeros(2, 3, 32, 32), bits=None, flex="full")
    artifact.save(graph.model, tmp_path)
    for option in ("--layers", "--json"):
        with pytest.raises(SystemExit) as ended:
            main(["measure", str(tmp_path), "--layers", option])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        if option == "--json":
            found = json.loads(text)["winograd"]
            assert found["parameters"] - found["in_table"] == found["trainable"] - found["in_table"] > 4 * 78
            assert found["rows"][1]["winograd"] == "F(4x4, 3x3)"
        else:
            line = next(line for line in text.splitlines() if line.startswith("layer1.0.conv1.weight"))
            assert "layer1.0.conv1.weight 4x4x3x3 1x4x32x32 F(4x4, 3x3) full FP 0.144".split() == line.split()[:-1]
            assert "parameters, trainable:" in text
