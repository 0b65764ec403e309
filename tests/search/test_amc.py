"""The search itself: budgets, what it gives back, that nothing is changed, that an interruption changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet as tn
from run_support import CtrlC, files, loaders, make, same
from tersenet.calibration.items import find_items
from tersenet.data.load import load_data
from tersenet.errors import NotFiniteError, TersenetError, UnknownNameError
from tersenet.graph.model import ModelGraph
from tersenet.measuring.layer_latency import LatencyTable, Row
from tersenet.search.amc import EPISODES, MARK, RECIPE, RESULT
from tersenet.search.amc_pruning import Reconstructed, Weakest
from tersenet.search.amc_rewards import below, reward_of
from tersenet.search.amc_settings import AmcResult, AmcSettings, budget_of
from tersenet.search.latency_costs import LatencyCosts
from tersenet.train.evaluate import evaluate

CPU = torch.device("cpu")
EXAMPLE = (torch.zeros(2, 1, 8, 8),)
MODES: list[dict[str, Any]] = [
    {"prune": "channel_pruning"},
    {"prune": "channel_pruning", "residual": "independent"},
    {"prune": "magnitude"},
    {"prune": "magnitude", "residual": "independent"},
]


def trained() -> nn.Module:
    """Far enough from chance that channels matter."""
    model = make()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model.eval()


def run(model: Any = None, **more: Any) -> AmcResult:
    settings: dict[str, Any] = {"target": "macs=60%", "episodes": 8, "images": 40, "device": "cpu"}
    return tn.search_rates(model or trained(), loaders(), **(settings | more))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["macs=60%", "params=70%"])
def test_no_episode_exceeds_the_budget_and_the_recipe_gives_the_best_one(mode: dict[str, Any], target: str) -> None:
    found = run(target=target, **mode)
    kind = target.partition("=")[0]
    assert found.limit == budget_of(target).limit(getattr(found, kind))
    assert len(found.episodes) == 8
    for episode in found.episodes:
        assert episode.cost == getattr(episode, kind) <= found.limit
    assert found.chosen.reward == max(episode.reward for episode in found.episodes)
    assert [layer.kept for layer in found.layers] == found.chosen.counts
    made = tn.compress(trained(), found.recipe(), data=loaders())
    assert (made.report.after.macs, made.report.after.params) == (found.chosen.macs, found.chosen.params)


def test_it_starts_from_even_and_measured_shares() -> None:
    found = run()
    assert [episode.kind for episode in found.episodes[:3]] == ["measured", "even", "searched"]
    starts = [found.first("even"), found.first("measured")]
    assert all(start is not None and found.chosen.reward >= start.reward for start in starts)
    assert [episode.kind for episode in run(prune="magnitude").episodes[:2]] == ["even", "searched"]
    assert run(target=None, reward="macs").episodes[0].kind == "searched"


def test_rewards() -> None:
    accuracy = evaluate(trained(), load_data(loaders()).test, device=CPU)  # type: ignore[arg-type]
    assert accuracy.top1 is not None
    assert reward_of("accuracy", accuracy, 10, 20) == accuracy.top1
    assert reward_of("macs", accuracy, 1000, 20) == pytest.approx(-(1 - accuracy.top1) * 6.907755)
    assert reward_of("params", accuracy, 10, 1000) == pytest.approx(-(1 - accuracy.top1) * 6.907755)
    found = run(target=None, reward="params")
    assert found.limit is None
    assert all(e.accuracy and e.reward == reward_of("params", e.accuracy, e.macs, e.params) for e in found.episodes)


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_is_the_accuracy_of_the_network_that_it_prunes_and_leaves_no_trace(mode: dict[str, Any]) -> None:
    model, data, settings = trained(), load_data(loaders()), AmcSettings("macs=60%", images=40, **mode)
    before = copy.deepcopy(model)
    assert data.train is not None
    graph = ModelGraph(model, EXAMPLE)
    if settings.prune == "magnitude":
        graph = graph.with_residual(settings.residual)
        items = [item for item in find_items(graph, ("*",), (), sample=False).all if item.group is not None]
        way: Any = Weakest(graph, items, data, CPU)
    else:
        items = list(find_items(graph, ("*",), (), sample=settings.residual == "independent").all)
        way = Reconstructed(graph, items, data.train, settings, CPU)
    left = {item.name: item.size // 2 for item in items}
    outputs: list[torch.Tensor] = []
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with way.pruned(left), torch.no_grad():
            outputs.append(model(x))
            for item in items:
                if item.group is not None:
                    assert int(graph.alive(item.group).sum()) == item.size // 2
        assert same(model, before)
    assert torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        assert not torch.equal(outputs[0], model(x))
    with pytest.raises(KeyboardInterrupt), way.pruned(left):
        raise KeyboardInterrupt
    assert same(model, before)
    with way.pruned({item.name: item.size for item in items}), torch.no_grad():
        if settings.prune == "channel_pruning":
            assert torch.equal(model(x), before(x))


def test_layers_are_fitted() -> None:
    whole, data = trained(), load_data(loaders())
    assert data.train is not None
    x = torch.cat([batch for batch, _ in data.train.batches(0)])
    errors: list[float] = []
    for prune in ("channel_pruning", "magnitude"):
        model = trained()
        graph = ModelGraph(model, EXAMPLE)
        items = find_items(graph, ("a*",), (), sample=False).all
        settings = AmcSettings("macs=60%", images=40)
        way: Any = (
            Reconstructed(graph, items, data.train, settings, CPU)
            if prune == "channel_pruning"
            else Weakest(graph, items, data, CPU)
        )
        with way.pruned({"a.0": 6}), torch.no_grad():
            errors.append(float((model(x) - whole(x)).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_the_callers_module_is_not_changed(tmp_path: Path) -> None:
    model = trained().train()
    before = copy.deepcopy(model)
    run(model)
    for at in (0, 1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(model, out=tmp_path / "s", on_event=CtrlC(at))
    assert same(model, before)
    assert model.training


@pytest.mark.parametrize("prune", ["channel_pruning", "magnitude"])
@pytest.mark.parametrize("at", [1, 3, 7])
def test_interrupted_is_as_uninterrupted(tmp_path: Path, prune: str, at: int) -> None:
    """Also where the agent had learnt from what was lost with its process."""
    run(out=tmp_path / "whole", prune=prune)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "cut", prune=prune, on_event=CtrlC(at))
    lines = tmp_path / "cut" / EPISODES
    assert lines.read_bytes().count(b"\n") == at
    with lines.open("ab") as file:
        file.write(b'{"kind":"searched","cou')
    run(out=tmp_path / "cut", prune=prune)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_finished_search_is_read_and_another_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(out=tmp_path)
    assert set(files(tmp_path)) == {MARK, EPISODES, RESULT, RECIPE}
    assert AmcResult.model_validate_json((tmp_path / RESULT).read_bytes()) == first
    before = files(tmp_path)
    for change, message in (
        ({"target": "macs=50%"}, "target is 'macs=60%' there and 'macs=50%' here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"prune": "magnitude"}, "prune is"),
    ):
        with pytest.raises(TersenetError, match=message):
            run(out=tmp_path, **change)
    assert files(tmp_path) == before
    monkeypatch.setattr("tersenet.search.amc.pruning", lambda *_: pytest.fail("nothing is left to prune"))
    assert run(out=tmp_path) == first
    assert tn.Recipe.model_validate(first.recipe()).steps[0].method == "channel_pruning"


def test_seeds_decide_everything() -> None:
    torch.manual_seed(5)
    first = run()
    torch.manual_seed(6)
    assert run() == first
    assert run(seed=1).episodes[2:] != first.episodes[2:]


def within(most: float) -> dict[str, Any]:
    """Data whose loss is not a number for networks that are further off than `most`."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(most - F.cross_entropy(outputs, targets)).log()

    return loaders() | {"loss": loss}


def run_within(most: float, **more: Any) -> AmcResult:
    settings: dict[str, Any] = {"target": "macs=60%", "episodes": 8, "prune": "magnitude", "device": "cpu"}
    return tn.search_rates(trained(), within(most), **(settings | more))


def test_a_network_that_nothing_can_be_said_of_is_bad_and_ends_no_search(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    found = run_within(3.5, out=tmp_path / "whole", on_event=heard.append)
    broken = [episode for episode in found.episodes if episode.accuracy is None]
    good = [episode for episode in found.episodes if episode.accuracy is not None]
    assert len(found.episodes) == 8
    assert broken
    assert good
    assert all(episode.problem and "the mean loss over 40 samples is nan" in episode.problem for episode in broken)
    assert all(episode.problem is None for episode in good)
    assert max(episode.reward for episode in broken) < min(0.0, *(episode.reward for episode in good))
    assert found.chosen in good
    assert found.accuracy.top1 == max(e.accuracy.top1 or 0.0 for e in good if e.accuracy is not None)
    assert [event["problem"] for event in heard[1:]] == [episode.problem for episode in found.episodes]
    with pytest.raises(KeyboardInterrupt):
        run_within(3.5, out=tmp_path / "cut", on_event=CtrlC(3))
    assert run_within(3.5, out=tmp_path / "cut") == found
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_nothing_can_be_said_of_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="the mean loss over 40 samples is nan"):
        run_within(0.0, out=tmp_path)
    assert not (tmp_path / EPISODES).exists()
    left = iter([torch.tensor(1.0)] * 2)  # the network as it is takes two batches

    def loss(*_: Any) -> Tensor:
        return next(left, torch.tensor(torch.inf))

    data = loaders() | {"loss": loss}
    with pytest.raises(NotFiniteError, match=r"none of 3 episodes says how good its network is. The first: the mean"):
        tn.search_rates(trained(), data, "macs=60%", prune="magnitude", episodes=3, device="cpu")


@pytest.mark.parametrize("least", [0.8, 0.0, -2.5])
def test_the_reward_of_what_nothing_can_be_said_of_is_below_every_other(least: float) -> None:
    assert below([least, 0.9]) <= least - 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": None}, TersenetError, "the reward accuracy needs a target"),
        ({"target": "flops=50%"}, TersenetError, "is not understood"),
        ({"target": "latency=0ms"}, TersenetError, "must be above 0"),
        ({"target": "latency=150%"}, TersenetError, "at most 100%"),
        ({"reward": "speed"}, UnknownNameError, "unknown reward 'speed'"),
        ({"prune": "l1"}, UnknownNameError, "unknown pruning method 'l1'"),
        ({"lowest": 0.0}, TersenetError, r"lowest \(=0.0\) is the share"),
        ({"episodes": 0}, TersenetError, r"episodes \(=0\) must be at least 1"),
        ({"target": "macs=1%"}, TersenetError, r"a budget of [\d,]+ MACs can't be met: with 20% of every layer"),
        ({"include": ("layer9*",)}, UnknownNameError, "unknown layer 'layer9"),
        ({"include": "a*"}, TersenetError, "must be a list"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run(out=tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_costs_in_time_fall_with_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are timed for real; budgets are in made-up times, since those of a network this small are all overhead."""
    graph = ModelGraph(trained(), EXAMPLE)
    items = find_items(graph, ("*",), (), sample=False).all
    whole = np.array([item.size for item in items])
    random = np.random.default_rng(0)
    real = LatencyCosts(graph, items)
    monkeypatch.setattr("tersenet.search.latency_costs.measure_table", made_up)
    for costs in (real, LatencyCosts(graph, items)):
        for _ in range(20):
            left = np.array([random.integers(1, size + 1) for size in whole])
            more = np.minimum(left + random.integers(0, 3, len(whole)), whole)
            assert 0 < costs(left) <= costs(more) <= costs(whole)
        assert costs(np.zeros_like(whole)) == 0
    # Convolutions 1 -> 8, 8 -> 12, 12 -> 8; at half of both axes, and at eleven sixteenths of one.
    assert LatencyCosts(graph, items)(whole) == 1000 * (8 + 96 + 96)
    assert LatencyCosts(graph, items)(np.array([4, 6])) == 1000 * (4 + 24 + 24)
    found = run(target="latency=70%", episodes=4)
    assert found.limit == 140_000
    assert all(episode.cost <= 140_000 for episode in found.episodes)


def made_up(layers: Any, batch: int = 1) -> LatencyTable:
    """A millisecond for each pair of channels."""
    rows = {
        shape: Row(shape=shape, tile=tile, bits=bits, ms=shape.in_channels * shape.out_channels / shape.groups)
        for _, shape, tile, bits in layers
    }
    return LatencyTable(environment={}, batch=batch, threads=1, rows=tuple(rows.values()))
