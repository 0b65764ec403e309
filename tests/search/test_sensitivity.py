"""The analysis itself: what a point is, that nothing is changed, that an interruption changes nothing."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet as tn
from run_support import CtrlC, files, loaders, make, same
from tersenet.api import open_model
from tersenet.cli.sensitivity import Progress
from tersenet.data.bundle import TensorLoader
from tersenet.data.load import load_data
from tersenet.errors import ArtifactError, TersenetError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import record_of
from tersenet.graph.select import named_rates
from tersenet.search.folder import MARK, PAGE, POINTS, RESULT
from tersenet.search.images import choose
from tersenet.search.sensitivity import masked
from tersenet.search.settings import SCORES
from tersenet.search.tables import render_text
from tersenet.train.evaluate import evaluate

RATES = (0.0, 0.25, 0.5, 0.75)
CPU = torch.device("cpu")


def trained() -> nn.Module:
    """Far enough from chance that channels matter."""
    model = make()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model.eval()


def run(model: Any = None, data: Any = None, /, **more: Any) -> Any:
    settings: dict[str, Any] = {"rates": RATES, "device": "cpu"}
    return tn.sensitivity(model or trained(), data or loaders(), **(settings | more))


def zeroed_by_hand(model: nn.Module, layers: list[str], count: int) -> nn.Module:
    """Without the `count` channels whose filters have the smallest L1 norms, over all of these tied layers: no filter,
    no bias (`a.0` has none), no batch norm (`a.1`, behind `a.0`)."""
    model = copy.deepcopy(model)
    weights = [model.get_parameter(f"{layer}.weight") for layer in layers]
    norms = sum(weight.detach().abs().flatten(1).sum(1) ** 2 for weight in weights)
    assert isinstance(norms, Tensor)
    weakest = norms.argsort()[:count]
    silent = [*weights, *(model.get_parameter(f"{layer}.bias") for layer in layers if layer != "a.0")]
    for tensor in silent if layers != ["a.0"] else [*weights, *model.get_submodule("a.1").parameters()]:
        tensor.data[weakest] = 0
    return model


def test_every_point_is_the_accuracy_of_the_masked_network() -> None:
    model, data = trained(), load_data(loaders())
    found = run(model)
    assert [layer.name for layer in found.layers] == ["stem", "a.0"]
    assert found.score == "top1"
    assert data.train is not None
    checked = 0
    for layer, tied in zip(found.layers, (["stem", "b"], ["a.0"]), strict=True):
        assert layer.producers == tied
        for point in layer.points:
            by_hand = zeroed_by_hand(model, tied, int(point.rate * layer.channels))
            assert point.removed == int(point.rate * layer.channels)
            assert point.accuracy == evaluate(by_hand, data.train, device=CPU)
            checked += point.accuracy.loss != found.baseline.loss
    assert checked >= 5


def test_rate_0_is_the_whole_network() -> None:
    found = run()
    assert found.baseline == evaluate(trained(), load_data(loaders()).train, device=CPU)  # type: ignore[arg-type]
    for layer in found.layers:
        first = layer.points[0]
        assert (first.rate, first.removed, first.macs, first.accuracy) == (0.0, 0, found.macs, found.baseline)
        assert found.drop(first) == 0


def test_macs() -> None:
    found = run()
    stem, a, b, heads = 9 * 8 * 64, 9 * 8 * 12 * 64, 9 * 12 * 8 * 64, 2 * 8 * 10
    assert found.macs == stem + a + b + heads
    shares = {layer.name: layer.macs_share for layer in found.layers}
    assert shares == {"stem": 1.0, "a.0": pytest.approx((a + b) / found.macs)}
    assert [point.macs for point in found.layers[1].points] == [
        stem + heads + (a + b) * left // 12 for left in (12, 9, 6, 3)
    ]


def test_a_layer_that_loses_the_same_channels_is_not_evaluated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersenet.search import sensitivity

    calls: list[int] = []
    monkeypatch.setattr(sensitivity, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    # Of 8 and of 12 channels.
    found = run(rates=(0.01, 0.26, 0.27, 0.3))
    removed = [[point.removed for point in layer.points] for layer in found.layers]
    assert removed == [[0, 2, 2, 2], [0, 3, 3, 3]]
    assert len(calls) == 3


@pytest.mark.parametrize("importance", SCORES)
def test_every_importance_runs_and_repeats_itself(importance: str) -> None:
    if importance == "bn_scale":
        with pytest.raises(TersenetError, match="bn_scale needs a batch norm behind stem"):
            run(importance=importance)
        found = [run(importance=importance, include=["a*"]) for _ in range(2)]
    else:
        found = [run(importance=importance) for _ in range(2)]
    assert found[0] == found[1]


def test_residual_mode_independent_takes_each_layer_by_itself() -> None:
    found = run(residual="independent")
    assert {layer.name for layer in found.layers} >= {"a.0", "b"}


def test_the_callers_module_is_not_changed(tmp_path: Path) -> None:
    model = trained().train()
    before = copy.deepcopy(model)
    run(model)
    for at in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(model, out=tmp_path / "s", on_event=CtrlC(at))
    assert same(model, before)
    assert model.training
    assert record_of(model) is None


@pytest.mark.parametrize("name", ["stem", "a.0"])
def test_weights_are_put_back_bit_by_bit(name: str) -> None:
    model = trained()
    # Neither of them survives arithmetic, nor a comparison by value.
    model.get_parameter("a.0.weight").data[0, 0, 0] = torch.tensor([-0.0, float("nan"), 1e-45])
    before = {key: tensor.view(torch.uint8).clone() for key, tensor in state(model).items()}
    graph = ModelGraph(model, (torch.zeros(2, 1, 8, 8),))
    group = graph.group(name)
    kept = {name: torch.arange(2).numpy()}

    def inside() -> None:
        weight = model.get_parameter(f"{name}.weight")
        assert int(weight.flatten(1).ne(0).any(1).sum()) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), masked(graph, group, kept):
        inside()
    assert all(torch.equal(before[key], tensor.view(torch.uint8)) for key, tensor in state(model).items())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().reshape(-1) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("at", [0, 1, 2, 4, 7, 8])
@pytest.mark.parametrize("half", [b"", b'{"layer":"a.0","rate":0.', b"\x00\x00\n"])
def test_interrupted_is_as_uninterrupted(tmp_path: Path, at: int, half: bytes) -> None:
    run(out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "cut", on_event=CtrlC(at))
    points = tmp_path / "cut" / POINTS
    known = points.read_bytes().count(b"\n")
    assert known == 1 + at
    with points.open("ab") as file:
        file.write(half)
    events: list[dict[str, Any]] = []
    run(out=tmp_path / "cut", on_event=events.append)
    assert (events[0]["done"], len(events) - 1) == (known - 1, 8 - at)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_finished_analysis_is_read(tmp_path: Path) -> None:
    first = run(out=tmp_path)
    events: list[dict[str, Any]] = []
    assert run(out=tmp_path, on_event=events.append) == first
    assert [event["event"] for event in events] == ["start"]
    assert set(files(tmp_path)) == {MARK, POINTS, RESULT, PAGE}
    assert type(first).model_validate_json((tmp_path / RESULT).read_bytes()) == first


def test_another_analysis_in_the_folder(tmp_path: Path) -> None:
    run(out=tmp_path)
    before = files(tmp_path)
    for change, message in (
        ({"rates": (0.5,)}, r"rates is \[0.0, 0.25, 0.5, 0.75\] there and \[0.5\] here"),
        ({"importance": "l2"}, "importance is 'l1' there and 'l2' here"),
        ({"samples": 20}, "samples is 1000 there and 20 here"),
        ({"split": "test"}, "split is 'train' there and 'test' here"),
        ({"exclude": ["a*"]}, "exclude is"),
    ):
        with pytest.raises(TersenetError, match=message):
            run(out=tmp_path, **change)
    with pytest.raises(TersenetError, match="weights is"):
        run(make(), out=tmp_path)
    other = loaders() | {"train": [(x + 1, y) for x, y in loaders()["train"]]}
    with pytest.raises(TersenetError, match="images is"):
        run(None, other, out=tmp_path)
    assert files(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert run(out=tmp_path, rates=(0.5,), fresh=True).layers[0].points[0].rate == 0.5
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_folders_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TersenetError, match="is a file, not a folder"):
        run(out=tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / RESULT).write_text("mine")
    for fresh in (False, True):
        with pytest.raises(TersenetError, match="is not empty and holds no sensitivity analysis"):
            run(out=tmp_path / "full", fresh=fresh)
    assert (tmp_path / "full" / RESULT).read_text() == "mine"
    run(out=tmp_path / "s")
    points = tmp_path / "s" / POINTS
    points.write_text(points.read_text().replace('"layer":"stem"', '"layer":', 1))
    with pytest.raises(ArtifactError, match=r"sensitivity_points.jsonl:2 is damaged; start again with --fresh"):
        run(out=tmp_path / "s")
    assert run(out=tmp_path / "s", fresh=True) == run()


def test_what_is_left_out_has_a_reason() -> None:
    found = run(exclude=["a.*"])
    assert [layer.name for layer in found.layers] == ["stem"]
    assert found.skipped == {
        "the network's output": ["head"],
        "left out by include or exclude, or tied to a layer that is": ["a.0"],
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rates": (0.5, 1.0)}, TersenetError, r"rates \(=1.0\): .* below 1"),
        ({"rates": (-0.1,)}, TersenetError, r"rates \(=-0.1\)"),
        ({"rates": (float("nan"),)}, TersenetError, r"rates \(=nan\)"),
        ({"rates": ()}, TersenetError, "rates is empty"),
        ({"rates": "0.5"}, TersenetError, r"rates \(='0.5'\) must be a list"),
        ({"include": "a*"}, TersenetError, r"include \(='a\*'\) must be a list"),
        ({"samples": 0}, TersenetError, r"samples \(=0\) must be at least 1"),
        ({"importance": "l3"}, UnknownNameError, "unknown importance 'l3'; did you mean 'l2' or 'l1'"),
        ({"split": "val"}, UnknownNameError, "unknown split 'val'"),
        ({"split": "validation"}, TersenetError, "has no split 'validation'; it has train, test"),
        ({"residual": "tied"}, UnknownNameError, "unknown residual mode 'tied'"),
        ({"include": ["c*"]}, UnknownNameError, r"unknown layer 'c\*'"),
        ({"exclude": ["*"]}, TersenetError, "no layer is left to prune"),
        ({"device": "gpu"}, TersenetError, "device 'gpu'"),
        ({"model": "resnet9"}, UnknownNameError, "unknown model 'resnet9'"),
        ({"data": None}, TersenetError, "sensitivity needs data"),
        ({"data": "digit"}, UnknownNameError, "unknown data set 'digit'"),
        ({"data": loaders()["test"]}, TersenetError, "neither validation nor training images"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": trained(), "data": loaders(), "rates": RATES, "device": "cpu"}
    with pytest.raises(error, match=message) as raised:
        tn.sensitivity(**(arguments | change), out=tmp_path / "s")
    assert isinstance(raised.value, TersenetError)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "s").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TersenetError, match="without torchrun"):
        run()


def test_images_are_chosen_once_and_not_augmented() -> None:
    data = load_data("digits")
    assert choose(data, None, 50, 0, CPU).split == "validation"
    train = data.train
    assert isinstance(train, TensorLoader)
    chosen = choose(data, "train", 50, 0, CPU)
    again, other = choose(data, "train", 50, 0, CPU), choose(data, "train", 50, 1, CPU)
    assert (chosen.n, len(chosen)) == (50, 1)
    assert chosen.checksum == again.checksum != other.checksum
    assert len(chosen.items[0][1].unique()) == 10
    plain = copy.copy(train)
    plain.augment = None
    pool = torch.cat([images for images, _ in plain.batches(0)]).flatten(1)
    assert all(bool((pool == image).all(1).any()) for image in chosen.items[0][0].flatten(1))
    assert train.augment is not None
    # Of a user's own loader whole batches: 40 samples in two.
    assert [choose(load_data(loaders()), None, n, 0, CPU).n for n in (1, 20, 21, 1000)] == [20, 20, 40, 40]


def test_data_without_classes_goes_by_its_metric_or_its_loss() -> None:
    data = loaders() | {"loss": lambda outputs, targets: (outputs[:, 0] - targets).square().mean()}
    shaped = {key: [(x, y.float()) for x, y in data[key]] for key in ("train", "test")}
    found = run(None, data | shaped)
    assert found.score == "loss"
    point = found.layers[0].points[-1]
    assert found.drop(point) == point.accuracy.loss - found.baseline.loss
    found = run(None, data | shaped | {"metric": lambda outputs, targets: -(outputs[:, 0] - targets).abs()})
    assert found.score == "metric"
    assert found.drop(point := found.layers[0].points[-1]) == found.baseline.metric - point.accuracy.metric


@pytest.mark.parametrize("classes", [10, None])
def test_a_point_that_nothing_can_be_said_of_counts_as_lost_and_ends_nothing(
    tmp_path: Path, classes: int | None
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(3.5 - F.cross_entropy(outputs, targets.long())).log()

    data = loaders() | {"loss": loss}
    if classes is None:
        data |= {key: [(x, y.float()) for x, y in data[key]] for key in ("train", "test")} | {"classes": None}
    heard: list[dict[str, Any]] = []
    found = run(None, data, out=tmp_path, on_event=heard.append)
    assert found.score == ("top1" if classes else "loss")
    points = [(layer, point) for layer in found.layers for point in layer.points]
    lost = [(layer, point) for layer, point in points if point.accuracy is None]
    assert 0 < len(lost) < len(points)
    assert all(found.drop(point) == math.inf for _, point in lost)
    assert all(found.layer_rate(layer, 1e9) < point.rate for layer, point in lost)
    assert found.notes[-1].startswith(f"loss or metric not finite, which counts as all lost: {lost[0][0].name} at ")
    problems = [event["problem"] for event in heard if event.get("problem")]
    told = [Progress().trial(event) for event in heard[1:]]
    assert problems == [line.partition("  rate ")[2].partition("  ")[2] for line in told if "nan" in line] != []
    assert len([line for line in told if line.endswith("not finite")]) == len(lost)
    assert all("the mean loss over 40 samples is nan" in problem for problem in problems)
    assert "NaN" in (tmp_path / PAGE).read_text()
    assert "NaN" in render_text(found)
    before = files(tmp_path)
    assert run(None, data, out=tmp_path) == found
    assert files(tmp_path) == before


def test_norms_over_channels_are_told() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.GroupNorm(1, 8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    notes = [note for note in run(net).notes if "means over channels" in note]
    assert len(notes) == 1
    assert notes[0].startswith("0: ")
    assert not any("means over channels" in note for note in run().notes)


@pytest.fixture(scope="module")
def digits() -> Any:
    """Random weights on few images. In mode `coupled`, layers of a ResNet make channels of several groups."""
    found = run("resnet8", "digits", samples=40, rates=(0.2, 0.4, 0.6))
    keys = [layer.producers[0] for layer in found.layers]
    assert len(set(keys)) < len(keys)
    return found


def test_the_rates_are_what_magnitude_takes(digits: Any) -> None:
    rates = digits.rates(max_drop=0.1)
    assert len(set(rates.values())) > 1
    step = {"method": "magnitude", "rates": rates}
    report = tn.compress("resnet8", {"steps": [step]}, data="digits", device="cpu").report
    removed = [{point.rate: point.removed for point in layer.points} | {0.0: 0} for layer in digits.layers]
    for row in report.layers:
        made = [
            gone[rates[layer.producers[0]]]
            for layer, gone in zip(digits.layers, removed, strict=True)
            if row.name in layer.producers
        ]
        assert row.out_before - row.out_after == sum(made)


def test_no_group_gets_more_than_it_bears_whatever_shares_its_layers(digits: Any) -> None:
    graph = ModelGraph(open_model("resnet8")[0], (torch.zeros(2, 3, 32, 32),))
    groups = [group for group in graph.groups if group.frozen is None]
    tightened = 0
    for max_drop in (0.0, 0.01, 0.03, 0.05, 0.1, 1.0):
        given = named_rates(graph, groups, digits.rates(max_drop))
        assert set(given) == {layer.name for layer in digits.layers}
        own = {layer.name: digits.layer_rate(layer, max_drop) for layer in digits.layers}
        assert all(given[name] <= rate for name, rate in own.items())
        tightened += given != own
    assert tightened
