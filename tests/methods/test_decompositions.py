"""`spatial_decomposition`, `channel_decomposition` and their 3C: acceptance facts, refusals, recipes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sfp_support import CLASSES, CPU, SHAPE, Batches, tiny_data
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet as tn
from graph_support import compare_on, randomise
from tersenet.data.bundle import Data
from tersenet.errors import TersenetError
from tersenet.exporting import artifact
from tersenet.graph.model import ModelGraph
from tersenet.measuring.macs import count_macs, layer_table
from tersenet.methods.base import Context, Method, TrainingMethod
from tersenet.methods.channel_decomposition import ChannelDecomposition
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.merge_pointwise import MergePointwise
from tersenet.methods.spatial_decomposition import SpatialDecomposition
from tersenet.models.open import Source, example_of
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.models.vgg import VGG, vgg
from tersenet.ops.gram import StatisticsError
from tersenet.progress import Progress
from tersenet.recipe import load_recipe
from tersenet.recipe_target import Target

EXAMPLE = (torch.zeros(2, *SHAPE),)
BOTH = pytest.mark.parametrize("cls", [SpatialDecomposition, ChannelDecomposition])


def data(n: int = 96) -> Data:
    return dataclasses.replace(tiny_data(), train=Batches(n, 32, 1))


def apply(method: Method, model: nn.Module, target: str | None = None, **more: Any) -> Context:
    graph = ModelGraph(model, EXAMPLE)
    wanted = Target.parse(target) if target else None
    more.setdefault("data", data())
    context = Context(CPU, 0, wanted, graph.macs(), graph.params(), **more)
    method.apply(graph, context)
    return context


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise(resnet_cifar(8, width=10, classes=CLASSES))


def output_error(whole: nn.Module, small: nn.Module) -> float:
    x = Batches(64, 32, 5).x
    with torch.no_grad():
        return float((small(x) - whole(x)).square().mean().sqrt() / whole(x).std(0).norm())


class Chain(nn.Module):
    """Three convolutions with biases and ReLUs."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.second, self.head = nn.Conv2d(12, 10, 3, padding=1), nn.Linear(10, CLASSES)
        if rank is not None:  # of this rank in both forms
            with torch.no_grad():
                low = torch.einsum(
                    "or,rch,rw->ochw", torch.randn(12, rank), torch.randn(rank, 8, 3), torch.ones(rank, 3)
                )
                self.first.weight.copy_(0.1 * low)

    def responses(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.responses(x)).mean((2, 3)))


@BOTH
def test_a_layer_of_that_rank_stays_as_it_is(cls: type[SpatialDecomposition]) -> None:
    whole, model = Chain(rank=4).eval(), Chain(rank=4).eval()
    context = apply(cls(ranks={"first": 4}, positions=64), model)
    pair = model.get_submodule("first")
    assert [c.weight.shape[0] for c in pair.children()] == [4, 12]  # pyright: ignore
    assert compare_on(whole, model, (torch.randn(4, *SHAPE),)) < 1e-4
    assert context.equality is not None
    assert context.equality.relative < 1e-5


@BOTH
def test_the_fit_lowers_the_error_on_other_images(cls: type[SpatialDecomposition]) -> None:
    """Beside the same pair with weights nearest to the layer's own."""
    from tersenet.calibration.low_rank_fit import FORMS
    from tersenet.calibration.low_rank_layers import find_splittable

    whole, fitted, nearest = Chain().eval(), Chain().eval(), Chain().eval()
    apply(cls(ranks={"second": 4}, relu=False), fitted)
    layer = next(n for n in find_splittable(ModelGraph(nearest, EXAMPLE), cls.form, ("second",), None, False).chosen)
    splitting = FORMS[cls.form](ModelGraph(nearest, EXAMPLE), layer)
    weight = splitting.weight
    if cls.form == "spatial":
        from tersenet.ops.low_rank import composed, spatial_decomposition

        near = composed(*spatial_decomposition(weight).pair(4))
    else:
        vectors = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0][:, :4]
        near = torch.tensordot(vectors @ vectors.T, weight, 1)
    with torch.no_grad():
        nearest.second.weight.copy_(near)
    x = Batches(64, 32, 5).x
    with torch.no_grad():
        errors = [
            float(
                (
                    (n.responses(x) - whole.responses(x)) - (n.responses(x) - whole.responses(x)).mean((0, 2, 3), True)
                ).std()
            )
            for n in (fitted, nearest)
        ]
    assert errors[0] < 0.96 * errors[1]


@BOTH
def test_behind_a_relu_the_relu_is_what_counts(cls: type[SpatialDecomposition]) -> None:
    whole = Chain().eval()
    x = Batches(96, 96, 1).x
    errors: dict[bool, float] = {}
    for relu in (True, False):
        model = Chain().eval()
        apply(cls(ranks={"second": 3}, relu=relu, positions=64), model)
        with torch.no_grad():
            errors[relu] = float((F.relu(model.responses(x)) - F.relu(whole.responses(x))).square().mean())
    assert errors[True] < 0.97 * errors[False]


@BOTH
def test_the_bias_is_whole(cls: type[SpatialDecomposition]) -> None:
    """Without a ReLU behind it, a constant added to a layer's bias comes out as that constant."""
    models = [Chain().eval(), Chain().eval()]
    with torch.no_grad():
        models[1].get_parameter("second.bias").add_(3.0)
    for model in models:
        apply(cls(ranks={"second": 4}, relu=False), model)
    plain, shifted = (m.get_submodule("second.1") for m in models)
    torch.testing.assert_close(shifted.bias, plain.bias + 3.0, rtol=0, atol=1e-4)  # pyright: ignore
    torch.testing.assert_close(shifted.weight, plain.weight, rtol=0, atol=1e-4)


@BOTH
def test_batch_norm_keeps_the_statistics_of_what_it_reads(cls: type[SpatialDecomposition]) -> None:
    """In training mode the small network gives what it gives in evaluation mode, on the images it was fitted on."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Flatten(),
        nn.Linear(12 * 16, CLASSES),
    )  # fmt: skip
    x = Batches(96, 96, 1).x
    norm: Any = model[2]
    norm.momentum = 1.0
    model.train()(x)  # its own statistics, so that the original agrees in both modes
    model.eval()
    apply(cls(ranks={"1": 4}, positions=64), model)
    with torch.no_grad():
        evaluated, trained = model(x), copy.deepcopy(model).train()(x)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=2e-2 * float(evaluated.std()))


def test_batch_norm_scales_of_zero_do_no_harm() -> None:
    for cls in (SpatialDecomposition, ChannelDecomposition):
        whole = resnet()
        with torch.no_grad():
            for module in whole.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight[::3] = 0.0
        model = copy.deepcopy(whole)
        apply(cls(rate=0.3), model)
        assert all(t.isfinite().all() for t in model.state_dict().values())
        assert output_error(whole, model) < 0.5


def test_later_layers_make_up_for_what_earlier_ones_have_lost() -> None:
    whole, alone, both = Chain().eval(), Chain().eval(), Chain().eval()
    apply(SpatialDecomposition(ranks={"first": 3}, positions=64), both)
    with torch.no_grad():
        alone.first.weight.copy_(composed_of(both.get_submodule("first")))
        alone.get_parameter("first.bias").copy_(both.get_parameter("first.1.bias"))
    assert not torch.equal(both.second.weight, whole.second.weight)
    assert output_error(whole, both) < 0.8 * output_error(whole, alone)


def composed_of(pair: nn.Module) -> Tensor:
    from tersenet.ops.low_rank import composed

    first, second = (module.get_parameter("weight").detach() for module in pair.children())
    return composed(first, second)


@BOTH
@pytest.mark.parametrize("target", ["macs=70%", "params=70%"])
@pytest.mark.parametrize("allocate", ["measured", "energy", "uniform"])
def test_fact_19_a_target_is_met_and_used_up(cls: type[SpatialDecomposition], target: str, allocate: Any) -> None:
    model = Chain().eval() if cls.form == "channel" else resnet()
    whole = ModelGraph(model, EXAMPLE)
    before = whole.macs() if target.startswith("macs") else whole.params()
    apply(cls(allocate=allocate, exclude=()), model, target)
    after = ModelGraph(model, EXAMPLE)
    left = after.macs() if target.startswith("macs") else after.params()
    # A rank of a network this small is a few per cent of it.
    assert 0.66 * before < left <= 0.7 * before


def test_measured_ranks_are_better_than_even_ones() -> None:
    whole = resnet()
    errors: dict[str, float] = {}
    for allocate in ("measured", "uniform"):
        model = resnet()
        apply(SpatialDecomposition.model_validate({"allocate": allocate}), model, "macs=55%")
        errors[allocate] = output_error(whole, model)
    assert errors["measured"] < errors["uniform"]


def test_ranks_are_multiples() -> None:
    model = resnet()
    apply(SpatialDecomposition(multiple=4), model, "macs=60%")
    ranks = [m[0].out_channels for m in model.modules() if _is_pair(m)]  # pyright: ignore
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)


def _is_pair(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 2 and all(type(m) is nn.Conv2d for m in module)


def test_what_cannot_be_split_is_left_with_the_reason() -> None:
    torch.manual_seed(0)
    tied = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3)), tied,
        nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.LazyLinear(CLASSES),
    )  # fmt: skip
    model[5].weight = tied.weight
    model(torch.zeros(2, *SHAPE))
    notes = "\n".join(apply(SpatialDecomposition(rate=0.3), model.eval()).notes)
    for reason in ("first layer costs little", "grouped or depthwise", "has one axis only", "nothing to split"):
        assert reason in notes
    notes = "\n".join(apply(ChannelDecomposition(ranks={"3": 7}), model.eval()).notes)
    assert "3 left whole: rank 7 saves nothing" in notes
    assert "it is 1x1 (`pointwise: true` takes it)" in notes


def test_a_named_rank_and_a_rate_for_the_rest() -> None:
    model = Chain().eval()
    apply(ChannelDecomposition(ranks={"first": 2}, rate=0.5), model)
    assert model.get_submodule("first.0").out_channels == 2
    whole = 12 * 9 * 10
    each = 12 * 9 + 10
    assert model.get_submodule("second.0").out_channels == whole // 2 // each


@pytest.mark.parametrize("bad", [{"ranks": {"first": 0}}, {"rate": 1.0}, {"target": "macs"}, {"allocate": "even"}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rank|rate|target|allocate"):
        SpatialDecomposition.model_validate(bad)


@BOTH
def test_values_that_are_not_finite_name_the_layer_and_nothing_is_changed(cls: type[SpatialDecomposition]) -> None:
    model = Chain().eval()
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StatisticsError, match="second"):
        apply(cls(rate=0.4), model)
    assert all(torch.equal(v.nan_to_num(), model.state_dict()[k].nan_to_num()) for k, v in before.items())


@BOTH
def test_an_interruption_leaves_the_network_as_it_was(cls: type[SpatialDecomposition], monkeypatch: Any) -> None:
    model = Chain().eval()
    before = copy.deepcopy(model.state_dict())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersenet.calibration.low_rank_solver.compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(cls(rate=0.4), model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert ModelGraph(model, EXAMPLE).record.edits == ()


class Interrupted(Exception):
    pass


class Stopping(Progress):
    """A process that dies when it wants to keep its part number `left`, counted from 0."""

    left = 0

    def put(self, name: str, value: Any) -> None:
        if not self.left:
            raise Interrupted
        self.left -= 1
        super().put(name, value)


@BOTH
def test_an_interrupted_step_goes_on_behind_the_last_layer(cls: type[SpatialDecomposition], tmp_path: Path) -> None:
    whole, model, method = Chain().eval(), Chain().eval(), cls(exclude=())
    apply(method, whole, "macs=80%")
    before = copy.deepcopy(model.state_dict())
    stopping = Stopping(tmp_path)
    stopping.left = 2  # the curves, and one layer
    with pytest.raises(Interrupted):
        apply(method, model, "macs=80%", progress=stopping)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    context = apply(method, model, "macs=80%", progress=Progress(tmp_path))
    assert len(context.fits) > 2
    states = whole.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@BOTH
def test_too_few_rows_and_constant_images(cls: type[SpatialDecomposition]) -> None:
    whole, model = Chain().eval(), Chain().eval()
    notes = "\n".join(apply(cls(rate=0.2, images=2, positions=2), model).notes)
    assert "4 calibration rows can't determine" in notes
    loader = Batches(32, 16, 1)
    loader.x.zero_()
    model = Chain().eval()
    apply(cls(rate=0.4), model, data=dataclasses.replace(tiny_data(), train=loader))
    assert compare_on(whole, model, (torch.zeros(4, *SHAPE),)) < 1e-3


def test_out_of_reach_says_the_floor() -> None:
    with pytest.raises(TersenetError, match=r"can't be met.*are left of.*`exclude: \[\]` takes the first"):
        apply(SpatialDecomposition(), Chain().eval(), "macs=5%")


@pytest.mark.slow
def test_three_steps_then_saved_loaded_and_exported(tmp_path: Path) -> None:
    """3C on a built-in network: pairs of pairs are pruned, and the folder alone gives the network again."""
    model = Source("resnet20", arguments=(("width", 8),)).open(SHAPE, CLASSES)
    randomise(model)
    whole = copy.deepcopy(model)
    contexts: list[Context] = []
    for method in (
        SpatialDecomposition(images=64, rate=0.4, include=("layer1.*",)),
        ChannelDecomposition(images=64, rate=0.1, include=("layer1.*",)),
        ChannelPruning(images=64, rate=0.25, include=("layer1.*.conv1.*",)),
    ):
        before = ModelGraph(model, EXAMPLE).macs()
        contexts.append(apply(method, model))
        assert ModelGraph(model, EXAMPLE).macs() < before
    assert {e.kind for e in ModelGraph(model, EXAMPLE).record.edits} >= {"split", "keep"}
    assert all(c.equality is not None and c.equality.relative < 1e-5 for c in contexts)
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path)
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert output_error(whole, model) < 1.0


def test_merging_is_exact_and_idle_where_nothing_pays() -> None:
    model = Chain().eval()
    torch.manual_seed(1)
    model.first = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1))  # pyright: ignore
    whole, macs = copy.deepcopy(model), ModelGraph(model, EXAMPLE).macs()
    context = apply(MergePointwise(), model)
    assert context.notes == ["first.0 and first.1 are one layer now"]
    assert compare_on(whole, model, (torch.randn(4, *SHAPE),)) < 1e-5
    assert ModelGraph(model, EXAMPLE).macs() < macs
    assert "nothing to merge" in apply(MergePointwise(), model).notes[0]


def vgg16() -> VGG:
    """Without the 120 million weights of its first linear layers, and without values."""
    with torch.device("meta"):
        model = vgg(16)
        model.classifier = nn.Linear(512 * 7 * 7, 2)
    return model.to_empty(device="cpu").eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "decomposed", "ratio"),
    [("channel_pruning_3c_vgg16_4x", 3.018, 3.226), ("channel_pruning_3c_vgg16_5x", 4.036, 4.317)],
)
def test_published_ranks_give_the_ratios_of_the_specification(recipe: str, decomposed: float, ratio: float) -> None:
    model = vgg16()
    example = torch.zeros(1, 3, 224, 224)

    def convolutions() -> int:
        return sum(cost.macs for cost in layer_table(model, example).values() if cost.kind.startswith("conv"))

    whole, left = convolutions(), list[float]()
    for step in load_recipe(recipe).steps:
        if not isinstance(step, TrainingMethod):
            step.preview(ModelGraph(model, (example.repeat(2, 1, 1, 1),)), Context(CPU, 0))
            left.append(whole / convolutions())
    assert whole == 15_346_630_656
    assert left[1] == pytest.approx(decomposed, abs=1e-3)
    assert left[2] == left[3] == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize(
    ("recipe", "target", "included"),
    [
        ("spatial_decomposition", None, "*"),
        pytest.param("channel_decomposition", "macs=92%", "layer1.*", marks=pytest.mark.slow),
        pytest.param("channel_pruning_3c", None, "*", marks=pytest.mark.slow),
    ],
)
def test_shipped_recipes(recipe: str, target: str | None, included: str, tmp_path: Path) -> None:
    settings = load_recipe(recipe)
    short: dict[str, Any] = {"model_arguments.width": 4}
    for number, step in enumerate(settings.steps):
        if "images" in type(step).model_fields:
            short |= {f"steps.{number}.images": 32, f"steps.{number}.allocate": "uniform"}
            short |= {f"steps.{number}.include": [included]}
    result = tn.compress("resnet20", recipe, data="digits", out=tmp_path, target=target, overrides=short)
    report = result.report
    assert report.after.macs <= Target.parse(target or settings.target or "").limit(report.before.macs)
    assert count_macs(result.model, example_of(result.model))[0] == report.after.macs
    assert any(fit.what == "rank" for step in report.steps for fit in step.fits)


@pytest.mark.slow
def test_fact_23_pairs_are_saved_loaded_exported_and_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spatial pairs, channel pairs, and pairs of pairs."""
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    model = Source("resnet8", arguments=(("width", 8),)).open(SHAPE, CLASSES)
    randomise(model)
    apply(SpatialDecomposition(images=64, rate=0.3, include=("layer1.*", "layer2.*")), model)
    apply(ChannelDecomposition(images=64, rate=0.1, include=("layer2.*.1", "layer3.0.conv2")), model)
    kinds = [edit.form for edit in ModelGraph(model, EXAMPLE).record.edits if edit.kind == "split"]
    assert {"spatial", "channel"} == set(kinds)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(x)
    loaded = tn.load(tn.save(model, tmp_path / "saved"))
    fast = tn.lower(loaded, x)
    tn.export(loaded, tmp_path / "net.pt2", x)
    with torch.no_grad():
        assert torch.equal(loaded(x), wanted)
        assert float((fast(x) - wanted).norm() / wanted.norm()) < 1e-4
        torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), wanted, rtol=1e-5, atol=1e-5)


def test_fact_23_pairs_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = Chain().eval()
    apply(SpatialDecomposition(ranks={"first": 5}), model)
    apply(ChannelDecomposition(ranks={"first.1": 4, "second": 4}), model)
    assert isinstance(model.get_submodule("first.1"), nn.Sequential)
    tn.export(model, tmp_path / "net.onnx", torch.zeros(1, *SHAPE))
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 3):
        x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
