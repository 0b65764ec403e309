"""`sparse_winograd`: facts S5 to S14 of the specification, and what users can get wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sparse_support import PAIRS, applied, data, graph_of, images, net, trained
from torch import Tensor, nn
from torch.nn import functional as F

from run_support import same
from tersenet.errors import GraphError, TersenetError, UnknownNameError
from tersenet.exporting import artifact
from tersenet.graph.edits import Sparsify, WinogradDomain
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import record_of
from tersenet.measuring.macs import count_macs, layer_table, params_of
from tersenet.measuring.workload import workload
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseTraining, SparseWinograd
from tersenet.models.build import build
from tersenet.nn.masked import MaskedConv2d, masked_layers
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.ops.winograd import kronecker
from tersenet.train.hooks import TrainState

CPU = torch.device("cpu")
FIT: dict[str, Any] = {"epochs": 2, "lr": 0.05}


def layers(model: nn.Module) -> dict[str, WinogradReLUConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, WinogradReLUConv2d)}


def densities(model: nn.Module) -> dict[str, float]:
    return {name: layer.density for name, layer in masked_layers(model).items()}


def spatially(model: nn.Module) -> nn.Module:
    """With the ReLUs before the transforms again."""
    for layer in layers(model).values():
        layer.spatial_share = 1.0
    return model


# Which layers


def test_every_pair_is_converted_and_the_rest_left_with_a_reason() -> None:
    model = net()
    expected = model(images(3))
    context = applied(model)
    assert layers(model).keys() == PAIRS
    notes = "\n".join(context.notes)
    assert "5 layers with weight and ReLU in the Winograd domain" in notes
    assert "trunk left as is: its ReLU is read by the network's own forward too (add)" in notes
    assert "point left as is: its kernel is 1x1" in notes
    assert "stem left as is: left out by include or exclude" in notes
    # The ReLUs that stay are those that were not asked for: with the others back it is the network that it was.
    assert not torch.allclose(model(images(3)), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(spatially(model)(images(3)), expected)


@pytest.mark.parametrize("calls", range(5))
def test_a_conversion_that_fails_halfway_leaves_the_network_as_it_was(
    calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers, the ReLUs that were left out of its forward, its record and what the graph knows."""
    model, before = net(), net()
    graph = graph_of(model)
    known, modules = record_of(model), dict(model.named_modules())
    method = SparseWinograd.model_validate({"fit": FIT, "density": 0.5})
    whole, left = graph.apply, [calls]

    def failing(edit: Any) -> None:
        whole(edit)
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError

    monkeypatch.setattr(graph, "apply", failing)
    with pytest.raises(MemoryError):
        method.apply(graph, Context(CPU, 0))
    assert record_of(model) == known == graph.record
    found = dict(model.named_modules())
    assert found.keys() == modules.keys()
    assert all(found[name] is modules[name] for name in found)
    assert type(model) is type(before)
    assert same(model, before)
    assert torch.equal(model(images(3)), before(images(3)))
    left[0] = 100
    method.apply(graph, Context(CPU, 0))
    applied(before, density=0.5)
    assert torch.equal(model(images(3)), before(images(3)))


def test_layers_without_their_relu_can_be_native() -> None:
    model = net()
    expected = model(images(3))
    context = applied(model, others="native")
    assert layers(model).keys() == PAIRS | {"trunk"}
    assert [name for name, layer in layers(model).items() if not layer.settings.relu] == ["trunk"]
    assert any(note.startswith("trunk without their ReLU: its ReLU is read by") for note in context.notes)
    torch.testing.assert_close(spatially(model)(images(3)), expected)


def test_a_relu_that_two_layers_read_moves_into_both_or_none() -> None:
    assert {"left", "right"} & layers_with(exclude=("position:first", "left")) == set()
    assert layers_with(exclude=("position:first", "left")) == PAIRS - {"left", "right"}
    assert layers_with(include=("f*", "position:last")) == {"functional"}


def layers_with(**settings: Any) -> set[str]:
    model = net()
    applied(model, **settings)
    return set(layers(model))


@pytest.mark.parametrize(
    ("name", "tile", "others"),
    [
        ("resnet8", 2, "native"),
        pytest.param("resnet20", 4, "native", marks=pytest.mark.slow),
        pytest.param("preresnet20", 4, "leave", marks=pytest.mark.slow),
        ("vgg11_bn_cifar", 4, "leave"),
        ("squeezenet_cifar", 2, "native"),
        ("convpool_cnn_c", 3, "leave"),
    ],
)
def test_families(name: str, tile: int, others: str) -> None:
    torch.manual_seed(0)
    model = build(name, width=4).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    settings = {"fit": FIT, "tile": tile, "others": others, "points": "lavin"}
    SparseWinograd.model_validate(settings).apply(ModelGraph(model, (x,)), Context(CPU, 0))
    found = layers(model)
    assert len(found) >= 3
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(spatially(model)(x), expected, rtol=1e-3, atol=1e-3 * scale)


def test_a_second_step_leaves_forwards_alone_whose_relus_were_counted() -> None:
    model = net()
    applied(model, include=("functional",))
    assert layers(model).keys() == {"functional"}
    with pytest.raises(
        TersenetError, match=r"no layer is left .*shared, .*: its ReLU is in the forward, from which an earl"
    ):
        applied(model)
    applied(model, mode="native", include=("shared",))
    assert layers(model).keys() == {"functional", "shared"}


def test_fact_s5_the_resnet_of_the_paper() -> None:
    model = build("pool_resnet18", width=4).eval()
    sizes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: sizes.__setitem__(name, tuple(inputs[0].shape[2:]))  # pyright: ignore
            )
    x = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
    assert sizes["features.9.conv2"] == sizes["features.8.conv2"] == (14, 14)
    model = build("pool_resnet18", width=4).eval()
    method = SparseWinograd.model_validate({"fit": FIT, "exclude": ()})
    context = Context(CPU, 0)
    method.apply(ModelGraph(model, (torch.zeros(1, 3, 64, 64),)), context)
    assert len(layers(model)) == 16
    left = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert left == {"conv1"} | {f"features.{i}.shortcut.{j}" for i, j in ((1, 2), (4, 1), (7, 1), (9, 1))}


@pytest.mark.parametrize(
    ("name", "side", "macs", "weights"),
    [
        ("vgg_nagadomi", 32, 228.3e6, 4.13e6),
        ("vgg_nagadomi_24", 24, 128.4e6, 4.13e6),
        ("convpool_cnn_c", 32, 409.7e6, 2.36e6),
        ("pool_resnet18", 224, 3059.5e6, 19.53e6),
    ],
)
def test_fact_s11_sizes(name: str, side: int, macs: float, weights: float) -> None:
    with torch.device("meta"):
        model = build(name)
    table = layer_table(model, torch.zeros(1, 3, side, side))
    assert sum(c.macs for c in table.values() if c.kind.startswith("conv")) == pytest.approx(macs, rel=3e-4)
    conv = sum(c.params for c in table.values() if c.kind == "conv 3x3" and c.in_channels > 3)
    assert conv * 16 / 9 == pytest.approx(weights, rel=1e-3)


def test_fact_s11_a_layer_has_16_ninths_of_the_weights_and_the_same_macs() -> None:
    model = net()
    sizes = {name: model.get_submodule(name).weight.numel() for name in PAIRS}  # pyright: ignore
    before = count_macs(model, images(1))
    applied(model)
    for name, layer in layers(model).items():
        assert layer.weight.numel() * 9 == sizes[name] * 16  # pyright: ignore
    assert count_macs(model, images(1)) == before


@pytest.mark.parametrize("tile", [2, 4])
def test_fact_s12_native_layers_reproduce_the_network(tile: int) -> None:
    model = net()
    expected = model(images(4))
    applied(model, mode="native", tile=tile, exclude=())
    assert layers(model).keys() == PAIRS | {"trunk", "stem"}
    assert (model(images(4)) - expected).abs().max() <= 1e-5


# Masks


@pytest.mark.parametrize(
    ("mode", "fit", "batches"),
    [
        ("winograd_relu", FIT, 10),
        ("winograd_relu", FIT | {"optimizer": "adam", "lr": 0.01}, 2),
        pytest.param("winograd_relu", FIT | {"optimizer": "adam", "lr": 0.01}, 10, marks=pytest.mark.slow),
        ("winograd_relu", FIT | {"ema": 0.9, "amp": True}, 2),
        ("native", FIT | {"optimizer": "adamw", "lr": 0.01}, 2),
        ("spatial", FIT, 2),
    ],
)
def test_fact_s8_masked_weights_stay_zero(mode: str, fit: dict[str, Any], batches: int) -> None:
    """Dense first, so that every weight has momentum when it is pruned."""
    seen: list[int] = []

    class Watching(SparseTraining):
        def after_step(self, state: TrainState) -> None:
            super().after_step(state)
            masked = masked_layers(state.model)
            assert masked
            for layer in masked.values():
                assert layer.mask is not None
                assert not layer.weight.detach()[~layer.mask].any()
            seen.append(state.step)

    settings: dict[str, Any] = {"mode": mode, "density": 0.3, "schedule": "cubic", "prune_from": 0.1, "prune_to": 0.5}
    model = net()
    fit = fit | {"epochs": 10, "weight_decay": 0.01}
    rows, _ = trained(model, given=data(batches), hooks_type=Watching, fit=fit, **settings)
    assert len(seen) == 10 * batches
    column = [row["density"] for row in rows]
    assert column == sorted(column, reverse=True)
    assert column[0] == 1
    assert column[-1] == column[4] == pytest.approx(0.3, abs=0.01)
    for layer in masked_layers(model).values():
        assert layer.mask is not None
        assert torch.equal(layer.weight.detach().ne(0), layer.mask)


def test_fact_s8_whoever_trains_on_they_stay_zero(tmp_path: Path) -> None:
    """Saved, loaded, and trained by somebody's own loop with weight decay and momentum."""
    model = net()
    trained(model, density=0.3)
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path, base=net(5)).train()
    assert same(loaded, model)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    before = copy.deepcopy(loaded)
    for step in range(20):
        optimizer.zero_grad()
        F.cross_entropy(loaded(images(8, step)), torch.arange(8) % 5).backward()
        optimizer.step()
    masks = masked_layers(before)
    for name, layer in masked_layers(loaded).items():
        assert layer.mask is not None
        assert torch.equal(layer.mask, masks[name].mask)  # pyright: ignore
        assert torch.equal(layer.weight.detach().ne(0), layer.mask)
        assert not torch.equal(layer.weight, masks[name].weight)


@pytest.mark.parametrize(
    "more", [{"ema": 0.9}, pytest.param({"optimizer": "adam", "lr": 0.01}, marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_same(more: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stages": (0.7, 0.4, 0.2), "schedule": "iterative", "move": 0.8}
    fit = FIT | {"epochs": 6} | more
    whole = net()
    trained(whole, fit=fit, **settings)

    class Stop(Exception):
        pass

    class Interrupted(SparseTraining):
        def after_epoch(self, state: TrainState) -> dict[str, Any]:
            if state.epoch == 3:
                raise Stop
            return super().after_epoch(state)

    with pytest.raises(Stop):
        trained(net(), checkpoint=tmp_path / "c.pt", hooks_type=Interrupted, fit=fit, **settings)
    resumed = net()
    rows, _ = trained(resumed, checkpoint=tmp_path / "c.pt", fit=fit, **settings)
    assert same(resumed, whole)
    shares = [row["spatial_share"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(1 - 1 / 4.8)
    assert shares[-2:] == [0.0, 0.0]
    assert [round(row["density"], 1) for row in rows] == [0.7, 0.4, 0.4, 0.2, 0.2, 0.2]
    assert all(layer.spatial_share == 0 for layer in layers(resumed).values())


def test_fact_s7_steps_in_a_chain_are_nested_and_the_layers_found_again() -> None:
    model = net()
    before: dict[str, Tensor] = {}
    for density in (0.7, 0.4, 0.1):
        _, context = trained(model, density=density)
        for name, layer in masked_layers(model).items():
            assert layer.mask is not None
            assert int(layer.mask.sum()) == int(layer.mask.numel() * density)
            assert name not in before or not (layer.mask & ~before[name]).any()
            before[name] = layer.mask.clone()
    assert before.keys() == PAIRS
    assert any("5 layers were so before" in note for note in context.notes)
    record = record_of(model)
    assert record is not None
    kinds = [edit.kind for edit in record.edits]
    assert (kinds.count("winograd_domain"), kinds.count("sparsify")) == (5, 5)
    with pytest.raises(TersenetError, match=r"density of 0\.2 is asked for, and 0\.09.* is left"):
        applied(model, density=0.2)


def test_a_gradual_step_goes_on_from_what_is_left() -> None:
    model = net()
    trained(model, density=0.4)
    rows, _ = trained(model, fit=FIT | {"epochs": 4}, density=0.1, schedule="cubic", prune_to=0.75)
    found = [row["density"] for row in rows]
    assert found == sorted(found, reverse=True)
    assert found[0] <= 0.4
    assert found[-1] == pytest.approx(0.1, abs=0.005)


def test_densities_of_single_layers_and_one_threshold() -> None:
    model = net()
    trained(model, density=0.5, densities={"poo*": 0.8, "left": 1.0})
    assert {n: round(d, 2) for n, d in densities(model).items()} == dict.fromkeys(PAIRS, 0.5) | {
        "pooled": 0.8,
        "left": 1.0,
    }
    model = net()
    trained(model, density=0.5, scope="global")
    found = densities(model)
    assert max(found.values()) - min(found.values()) > 0.01
    kept, size = (sum(f(layer) for layer in masked_layers(model).values()) for f in (_kept, _size))
    assert kept == pytest.approx(size / 2, abs=5)


def _kept(layer: Any) -> int:
    return int(layer.mask.sum())


def _size(layer: Any) -> int:
    return layer.mask.numel()


def test_the_smallest_density_keeps_a_weight() -> None:
    model = net()
    trained(model, density=1e-9)
    assert all(_kept(layer) == 1 for layer in masked_layers(model).values())


def test_keep_best_chooses_among_sparse_networks_only() -> None:
    model = net()
    settings: dict[str, Any] = {"density": 0.2, "schedule": "cubic", "prune_to": 0.6, "move": 0.6}
    trained(model, fit=FIT | {"epochs": 5, "keep": "best"}, **settings)
    assert all(density < 0.21 for density in densities(model).values())
    method = SparseWinograd.model_validate({"fit": FIT | {"epochs": 5}, **settings})
    graph = graph_of(net())
    context = Context(CPU, 0, data=data())
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    assert [hooks.selectable(epoch) for epoch in range(5)] == [False, False, True, True, True]


@pytest.mark.slow
def test_fact_s8_masks_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    script = Path(__file__).with_name("sparse_on_a_rank.py")
    done = subprocess.run(
        [*command, "--master-port", str(port), str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert all(0 < sum(mask) == round(0.25 * len(mask) - 0.5) for mask in first["masks"].values())
    assert first["zero"]


# Workload


def inputs_of_layers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for name, layer in masked_layers(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0]))  # pyright: ignore
    model(x)
    return inputs


def test_fact_s9_densities_and_products_are_counted_exactly() -> None:
    for mode in ("winograd_relu", "native", "spatial"):
        model = net()
        trained(model, mode=mode, density=0.3)
        x = images(3, 7)
        found = workload(model, [(x[:2], None), (x[2:], None)], 3)
        assert found.images == 3
        inputs = inputs_of_layers(model, x)
        rows = {row.name: row for row in found.rows}
        for name, layer in masked_layers(model).items():
            row, value = rows[name], inputs[name]
            assert layer.mask is not None
            assert row.weight_density == layer.mask.double().mean()
            assert (row.kind, row.weights) == (mode, layer.weight.numel())
            if isinstance(layer, WinogradReLUConv2d):
                v = layer.transformed(value)
            else:
                assert isinstance(layer, MaskedConv2d)
                taps = F.unfold(value, layer.kernel_size, padding=layer.padding)  # pyright: ignore
                v = taps.unflatten(1, (layer.in_channels, 9)).permute(2, 0, 3, 1).flatten(1, 2)
            assert row.activation_density == pytest.approx(float(v.ne(0).double().mean()))
            # Each product by itself.
            weight = layer.canonical(layer.weight)
            products = v[:, :, :, None].ne(0) & weight[:, None].ne(0)
            assert row.exact * 3 == pytest.approx(int(products.sum()))
            means = products.numel() * row.weight_density * row.activation_density
            assert row.by_means * 3 == pytest.approx(means)


def test_the_baselines_beside() -> None:
    model = net()
    applied(model)
    x = images(2, 3)
    row = next(row for row in workload(model, [(x, None)], 2).rows if row.name == "pooled")
    relu = F.max_pool2d(F.conv2d(x, model.stem.weight, model.stem.bias, padding=1), 2).relu()  # pyright: ignore
    taps = F.unfold(relu, 3, padding=1)
    assert row.spatial == int(taps.ne(0).sum()) * 6 / 2
    native = layers(model)["pooled"]
    native.spatial_share = 1.0
    assert row.native == int(native.transformed(relu).ne(0).sum()) * 6 / 2
    assert row.dense == 5 * 5 * 9 * 36
    assert row.exact < (row.native or 0)


@pytest.mark.parametrize(("weights", "activations", "reduction"), [(0.4, 0.42, 13.4), (0.6, 1.0, 3.75)])
def test_fact_s10_the_formula(weights: float, activations: float, reduction: float) -> None:
    """By means the reduction is 2.25 / (d_w d_a): of a layer whose map F(2, 3) tiles exactly."""
    conv = nn.Conv2d(5, 10, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), conv).eval()
    x = torch.randn(1, 2, 8, 8)
    applied_to = ModelGraph(model, (x,))
    settings = {"fit": FIT, "density": weights, "mode": "native" if activations == 1 else "winograd_relu"}
    method = SparseWinograd.model_validate(settings)
    method.preview(applied_to, Context(CPU, 0))
    row = next(row for row in workload(model, [(x, None)], 1).rows if row.kind != "dense")
    assert row.dense / row.by_means == pytest.approx(2.25 / (row.weight_density * row.activation_density))
    assert 2.25 / (weights * activations) == pytest.approx(reduction, abs=0.1)
    assert row.weight_density == pytest.approx(weights)


@pytest.mark.parametrize("tile", [2, 4])
def test_fact_s13_importance_makes_less_error_than_magnitude(tile: int) -> None:
    """One-shot, at density 0.5. For F(2, 3) the taps matter nearly alike."""
    errors: dict[str, float] = {}
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    x = torch.randn(4, 4, 12, 12)
    for score in ("magnitude", "importance"):
        model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), copy.deepcopy(conv)).eval()
        torch.manual_seed(1)
        model[0].reset_parameters()  # pyright: ignore
        expected = model(x)
        settings = {"fit": FIT, "mode": "native", "tile": tile, "density": 0.5, "score": score}
        SparseWinograd.model_validate(settings).preview(ModelGraph(model, (x,)), Context(CPU, 0))
        errors[score] = float(((model(x) - expected).norm() / expected.norm()).detach())
    assert errors["importance"] < (0.8 if tile == 4 else 1.05) * errors["magnitude"]


@pytest.mark.parametrize("tile", [2, 4])
def test_the_spatial_gradient_is_a_step_of_the_filters(tile: int) -> None:
    def step(mode: str, **more: Any) -> nn.Module:
        model = net()
        fit = {"epochs": 1, "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
        trained(model, given=data(1), fit=fit, mode=mode, tile=tile, **more)
        return model

    filters, native = step("spatial"), step("native", spatial_gradient=True)
    for name, layer in layers(native).items():
        _, g, _ = layer.transforms(torch.float32)
        weight = filters.get_submodule(name).weight.detach()  # pyright: ignore
        expected = kronecker(g) @ weight.permute(2, 3, 1, 0).reshape(9, -1)  # pyright: ignore
        torch.testing.assert_close(layer.weight.detach().flatten(1), expected, rtol=1e-4, atol=1e-5)


# Artifacts


@pytest.mark.parametrize("mode", ["winograd_relu", "native", "spatial"])
@pytest.mark.parametrize(
    ("pattern", "density"),
    [("unstructured", 0.25), ("4x1", 0.25), ("16x1", 0.25), ("2:4", None), ("unstructured", 0.01)],
)
def test_fact_s14_saved_it_is_small_and_loads_bit_exactly(
    mode: str, pattern: str, density: float | None, tmp_path: Path
) -> None:
    model = net()
    trained(model, given=data(1), fit=FIT | {"epochs": 1}, mode=mode, pattern=pattern, density=density)
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path, base=net(3))
    assert same(loaded, model)
    assert torch.equal(loaded(images(3)), model(images(3)))
    assert record_of(loaded) == record_of(model)


@pytest.mark.parametrize(("pattern", "share"), [("unstructured", 0.40), ("16x1", 0.27)])
def test_fact_s14_the_convolutions_of_vgg16(pattern: str, share: float, tmp_path: Path) -> None:
    """At a quarter of the width, which leaves the shares: all but the first layer, against dense Winograd weights."""
    model = build("vgg16", width=16).features.eval()  # pyright: ignore
    assert isinstance(model, nn.Module)
    graph = ModelGraph(model, (torch.zeros(1, 3, 32, 32),))
    settings = {"fit": FIT, "mode": "native", "density": 0.25, "pattern": pattern}
    # The last stage has maps of 2x2 here.
    SparseWinograd.model_validate(settings).preview(graph, Context(CPU, 0))
    from tersenet.graph.record import attach

    attach(model, graph.record)
    artifact.save(model, tmp_path)
    dense = sum(layer.weight.numel() * 4 for layer in masked_layers(model).values())
    assert len(masked_layers(model)) == 12
    assert (tmp_path / "model.safetensors").stat().st_size <= share * dense


def test_a_forged_artifact_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = net()
    trained(model, density=0.25)
    artifact.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if ".places" in name)
    kept = name.partition(".places")[0] + ".kept"
    bad: list[tuple[dict[str, Tensor], str]] = [
        ({name: tensors[name][:-1]}, "places"),
        ({name: tensors[name].to(torch.int32)}, "places"),
        ({kept: tensors[kept][:-1]}, "values of torch.float32 for"),
        ({kept: tensors[kept].to(torch.int64)}, "values of torch.int64 for"),
        ({kept: tensors[kept][None]}, "values of torch.float32 for"),
        ({name: ~tensors[name]}, "values of torch.float32 for"),
    ]
    for change, message in bad:
        save_file(tensors | change, tmp_path / "model.safetensors")
        _sign(tmp_path)
        with pytest.raises(TersenetError, match=message):
            artifact.load(tmp_path, base=net())
    save_file({n: t for n, t in tensors.items() if n != kept}, tmp_path / "model.safetensors")
    _sign(tmp_path)
    with pytest.raises(TersenetError, match="is missing"):
        artifact.load(tmp_path, base=net())


def _sign(folder: Path) -> None:
    """The forger knows about checksums."""
    import hashlib

    manifest = json.loads((folder / "model.json").read_text())
    manifest["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(manifest))


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "greater than 0"),
        ({"density": 1.5}, "less than or equal to 1"),
        ({"densities": {"a": 0}}, "greater than 0"),
        ({"density": 0.3, "schedule": "iterative"}, "needs stages"),
        ({"stages": (0.5, 0.2)}, "stages need it"),
        ({"stages": (0.2, 0.5), "schedule": "iterative"}, "must fall"),
        ({"stages": (0.5, 0.2), "schedule": "iterative", "density": 0.3}, "the last of them is the density"),
        ({"stages": (0.5, 0.4, 0.3), "schedule": "iterative"}, "3 stages need as many epochs, not 2"),
        ({"schedule": "cubic"}, "needs a density"),
        ({"density": 0.3, "schedule": "cubic", "prune_from": 0.8}, "must be below prune_to"),
        ({"density": 0.3, "pattern": "2:4"}, "2:4 has density 0.5"),
        ({"density": 0.3, "densities": {"a": 0.5}, "scope": "global"}, "need `scope: layer`"),
        ({"mode": "spatial", "score": "importance", "density": 0.3}, "spatial pruning has none"),
        ({"mode": "native", "move": 0.5}, "nothing moves"),
        ({"mode": "spatial", "init": "unit"}, "for weights in the Winograd domain"),
        ({"tile": 6}, "less than or equal to 4"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SparseWinograd.model_validate({"fit": FIT, **settings})


def test_what_does_not_fit_the_network_is_refused_before_anything_is_changed() -> None:
    model = net()
    before = copy.deepcopy(model)
    for settings, error, message in (
        ({"include": ("pooledd",)}, UnknownNameError, "pooledd"),
        ({"densities": {"stem": 0.5}}, UnknownNameError, "stem"),
        ({"exclude": ("*",)}, TersenetError, r"no layer is left for sparse_winograd .*left out by include or exclude"),
        ({"include": ("trunk", "point")}, TersenetError, r"no layer is left .*trunk: its ReLU is read by"),
        ({"points": ("0", "1")}, TersenetError, r"F\(2, 3\) needs 3 different points"),
    ):
        with pytest.raises(error, match=message):
            applied(model, **settings)
        assert same(model, before)
        assert {type(m) for m in model.modules()} == {type(m) for m in before.modules()}
    linear = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(TersenetError, match="the network has no convolution"):
        SparseWinograd.model_validate({"fit": FIT}).apply(ModelGraph(linear, (torch.zeros(2, 8),)), Context(CPU, 0))


def test_a_mask_of_another_tile_size_is_refused() -> None:
    model = net()
    applied(model, include=("functional",), density=0.5)
    small = model.get_submodule("functional").mask  # pyright: ignore
    other = net()
    applied(other, include=("functional",), density=0.5, tile=4)
    layer = layers(other)["functional"]
    with pytest.raises(TersenetError, match=r"a mask of \(16, 6, 6\) for a weight of \(36, 6, 6\)"):
        layer.set_mask(small)  # pyright: ignore


def test_edits_of_what_does_not_fit_are_refused() -> None:
    model = net()
    for edit, message in (
        (WinogradDomain.model_validate({"module": "point", "settings": {"relu": False}}), None),
        (WinogradDomain.model_validate({"module": "head", "settings": {}}), "must be an nn.Conv2d"),
        (WinogradDomain.model_validate({"module": "left", "settings": {}, "relu": {"owner": "pool"}}), "a MaxPool2d"),
        (Sparsify.model_validate({"module": "nowhere"}), "does not have"),
    ):
        with pytest.raises(GraphError, match=message or "kernel is 1x1"):
            edit.replay(model)


def test_channels_are_frozen_behind_a_conversion() -> None:
    model = net()
    params = params_of(model)
    applied(model, density=0.5)
    assert params_of(model) > params
    graph = graph_of(model)
    assert all(group.frozen for group in graph.groups)
    assert any("prune before" in (group.frozen or "") for group in graph.groups)
