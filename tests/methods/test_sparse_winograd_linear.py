"""`sparse_winograd` with `linear`: which linear layers get a mask, and that it holds as those of convolutions do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sparse_support import CPU, applied, data, images, trained
from torch import Tensor, nn
from torch.nn import functional as F

from run_support import same
from tersenet.errors import TersenetError, UnknownNameError
from tersenet.exporting import artifact
from tersenet.graph.edits import Sparsify
from tersenet.graph.model import ModelGraph
from tersenet.measuring.workload import workload
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseTraining, SparseWinograd
from tersenet.nn.masked import MaskedLinear, masked_layers
from tersenet.train.hooks import TrainState

FIT: dict[str, Any] = {"epochs": 2, "lr": 0.05}


class Net(nn.Module):
    """Two pairs and three linear layers in a row, one at the side that shares its weight, one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b, self.head = nn.Linear(100, 36), nn.Linear(36, 20), nn.Linear(20, 5)
        self.one, self.other, self.idle = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.conv(self.stem(x).relu()).relu(), 5).flatten(1)
        x = self.b(self.a(x).relu())
        return self.head(x + self.one(x) + self.other(x))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def masked(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: layer for name, layer in masked_layers(model).items() if isinstance(layer, MaskedLinear)}


@pytest.mark.parametrize("mode", ["winograd_relu", "native", "spatial"])
@pytest.mark.parametrize(
    ("linear", "more", "expected"),
    [
        ("dense", {}, set()),
        ("hidden", {}, {"a", "b"}),
        ("all", {}, {"a", "b", "head"}),
        ("hidden", {"exclude": ("position:first", "b")}, {"a"}),
        ("all", {"include": ("conv", "h*")}, {"head"}),
        ("hidden", {"density": None, "densities": {"b": 0.5}}, {"b"}),
    ],
)
def test_which_layers(mode: str, linear: str, more: dict[str, Any], expected: set[str]) -> None:
    model = net()
    x = images(3)
    before = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    context = applied(model, mode=mode, linear=linear, **{"density": 0.3, **more})
    found = masked(model)
    assert set(found) == expected
    assert all(layer.weight is before[name] and not layer.training for name, layer in found.items())
    note = f"{len(expected)} linear layers with a mask: {', '.join(sorted(expected))}"
    assert (note in context.notes) is bool(expected)
    reasons = "; ".join(context.notes)
    assert ("one, other left as is: it shares its weight" in reasons) is (linear != "dense" and "include" not in more)
    assert ("idle" in reasons) is (linear != "dense")
    assert isinstance(model.get_submodule("idle"), nn.Linear)
    if mode == "spatial":  # nothing is pruned yet
        assert torch.equal(model(x), net()(x))


def test_hooks_and_other_kinds_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    features = (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten())
    model = nn.Sequential(*features, Own(98, 6), nn.Linear(6, 6), nn.Linear(6, 5))
    model[4].register_forward_hook(print)
    context = applied(model.eval(), mode="native", linear="all", density=0.5)
    assert set(masked(model)) == {"5"}
    notes = "; ".join(context.notes)
    assert "3 left as is: it is a Own, which computes in a way of its own" in notes
    assert "4 left as is: it has hooks" in notes


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x1"])
def test_pruned_weights_stay_zero_and_the_folder_is_small(pattern: str, tmp_path: Path) -> None:
    """Dense first, so that every weight has momentum when it is pruned."""

    class Watching(SparseTraining):
        def after_step(self, state: TrainState) -> None:
            super().after_step(state)
            for layer in masked(state.model).values():
                assert layer.mask is not None
                assert not layer.weight.detach()[~layer.mask].any()

    model = net()
    fit = {"epochs": 4, "lr": 0.05, "weight_decay": 0.01, "ema": 0.9}
    settings: dict[str, Any] = {"schedule": "cubic", "prune_from": 0.1, "prune_to": 0.5, "linear": "hidden"}
    trained(model, hooks_type=Watching, fit=fit, mode="spatial", density=0.25, pattern=pattern, **settings)
    block = {"unstructured": 1, "4x1": 4, "16x1": 16}[pattern]
    for layer in masked(model).values():
        outputs, inputs = layer.weight.shape
        assert layer.mask is not None
        assert torch.equal(layer.weight.detach().ne(0), layer.mask)
        # Blocks of outputs, by one input each; the last may be smaller.
        blocks = F.pad(layer.mask.float(), (0, 0, 0, -outputs % block), value=-1).unflatten(0, (-1, block))
        assert bool(((blocks == 1) | (blocks == -1)).all(1).logical_or(((blocks == 0) | (blocks == -1)).all(1)).all())
        assert int((blocks == 1).any(1).sum()) == int(0.25 * -(-outputs // block) * inputs)
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path, base=net(3))
    assert same(loaded, model)
    assert torch.equal(loaded(images(3)), model(images(3)))
    dense = 4 * sum(value.numel() for value in net().parameters())
    pruned = 4 * sum(layer.weight.numel() for layer in masked_layers(model).values())
    header = 2500  # bytes of the names
    assert (tmp_path / "model.safetensors").stat().st_size < dense - pruned + 0.3 * pruned + header


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stages": (0.7, 0.4, 0.2), "schedule": "iterative", "linear": "all", "scope": "lamp"}
    fit = FIT | {"epochs": 6, "ema": 0.9}
    whole = net()
    rows, _ = trained(whole, fit=fit, **settings)
    assert set(masked(whole)) == {"a", "b", "head"}
    assert rows[-1]["density"] == pytest.approx(0.2, abs=0.01)

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
    trained(resumed, checkpoint=tmp_path / "c.pt", fit=fit, **settings)
    assert same(resumed, whole)


def test_steps_in_a_chain_are_nested_and_may_begin_with_convolutions_alone() -> None:
    model = net()
    before: dict[str, Tensor] = {}
    for density, linear in ((0.7, "dense"), (0.4, "hidden"), (0.1, "all")):
        _, context = trained(model, density=density, linear=linear)
        for name, layer in masked_layers(model).items():
            assert layer.mask is not None
            assert int(layer.mask.sum()) == int(layer.mask.numel() * density + 1e-9)
            assert name not in before or not (layer.mask & ~before[name]).any()
            before[name] = layer.mask.clone()
    assert before.keys() == {"conv", "a", "b", "head"}
    assert any("3 layers were so before: conv, a, b" in note for note in context.notes)
    with pytest.raises(TersenetError, match=r"density of 0\.2 is asked for, and 0\.\d+ is left"):
        applied(model, density=0.2, linear="hidden")
    # A later step that leaves them alone leaves their masks too.
    trained(model, density=0.05)
    assert torch.equal(masked(model)["a"].mask, before["a"])  # pyright: ignore[reportArgumentType]


def test_products_are_counted_exactly() -> None:
    model = net()
    trained(model, given=data(1), mode="spatial", density=0.3, linear="hidden")
    x, seen = images(3, 7), dict[str, Tensor]()
    for name, layer in masked(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))  # pyright: ignore
    rows = {row.name: row for row in workload(model, [(x[:2], None), (x[2:], None)], 3).rows}
    with torch.no_grad():
        model(x)
    for name, layer in masked(model).items():
        row, value = rows[name], seen[name]
        assert (row.kind, row.weights, row.dense) == ("linear", layer.weight.numel(), layer.weight.numel())
        assert row.weight_density == layer.density
        assert row.activation_density == pytest.approx(float(value.ne(0).double().mean()))
        assert row.exact * 3 == pytest.approx(int((value.ne(0)[:, None] & layer.weight.ne(0)).sum()))
        assert row.by_means * 3 == pytest.approx(3 * row.weights * row.weight_density * row.activation_density)
        assert row.spatial == pytest.approx(int(value.ne(0).sum()) * layer.out_features / 3)
    assert rows["head"].kind == "dense"


def test_a_network_of_linear_layers_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 2)).eval()
    graph = ModelGraph(model, (torch.zeros(2, 8),))
    settings = {"fit": FIT, "mode": "spatial", "density": 0.25, "linear": "hidden"}
    SparseWinograd.model_validate(settings).preview(graph, Context(CPU, 0))
    assert {name: layer.density for name, layer in masked(model).items()} == {"1": 0.25}
    assert all(group.frozen for group in ModelGraph(model, (torch.zeros(2, 8),)).groups)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValidationError, match="`linear: hidden` needs a density"):
        SparseWinograd.model_validate({"fit": FIT, "linear": "hidden"})
    with pytest.raises(ValidationError, match="'dense', 'hidden' or 'all'"):
        SparseWinograd.model_validate({"fit": FIT, "linear": True, "density": 0.5})
    with pytest.raises(UnknownNameError, match="head"):  # it is not one of those that get a mask
        applied(net(), linear="hidden", density=0.5, densities={"head": 0.5})
    with pytest.raises(UnknownNameError, match="b"):  # without `linear` patterns know convolutions only
        applied(net(), density=0.5, exclude=("b",))
    layer = MaskedLinear.from_linear(nn.Linear(6, 4))
    with pytest.raises(TersenetError, match=r"a mask of \(1, 4, 6\) for a weight of \(1, 6, 4\)"):
        layer.set_mask(torch.ones(1, 4, 6, dtype=torch.bool))


def test_an_edit_makes_no_mask_for_the_network_itself() -> None:
    with pytest.raises(TersenetError):
        Sparsify.model_validate({"module": ""}).replay(nn.Linear(3, 3))
