"""`winas` and `winograd_knapsack`: choices by a latency table, an exact knapsack, a search that resumes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersenet
from tersenet.errors import TersenetError
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import attach, record_of
from tersenet.measuring.layer_latency import LatencyTable, Row, Shape, measure_table
from tersenet.methods.base import Context
from tersenet.methods.winas import Winas, WinogradKnapsack
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.train.loop import fit
from tersenet.train.settings import Fit
from tersenet.winograd_search.knapsack import best_under

CPU = torch.device("cpu")
FIT: dict[str, Any] = {"epochs": 2, "lr": 0.01}
IMAGES = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.a, self.point, self.b):
            x = layer(x).relu()
        return self.fc(x.mean((2, 3)))


class Batches:
    n = 32

    def __len__(self) -> int:
        return 4

    def batches(self, epoch: int) -> Any:
        order = torch.randperm(32, generator=torch.Generator().manual_seed(epoch % 1000))
        return iter([(IMAGES[part], LABELS[part]) for part in order.split(8)])


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def context() -> Context:
    from tersenet.data.bundle import Data

    loaders = Batches(), Batches(), Batches()
    data: Any = Data("noise", *loaders, classes=4, shape=(1, 8, 8), normalise=((0.0,), (1.0,)))
    return Context(CPU, 0, data=data)


def sure() -> tuple[Net, Context]:
    """A network, and images that it is right about, and sure of it: whatever is changed costs loss."""
    torch.manual_seed(0)
    model, done = Net().eval(), context()
    with torch.no_grad():
        model.fc.weight.mul_(50)
        model.fc.bias.sub_(model(IMAGES).mean(0))
        labels = model(IMAGES).argmax(1)

    class Right(Batches):
        def batches(self, epoch: int) -> Any:
            return iter([(IMAGES[i : i + 8], labels[i : i + 8]) for i in range(0, 32, 8)])

    assert done.data is not None
    done.data = dataclasses.replace(done.data, train=Right(), validation=Right())
    return model, done


def graph_of(model: nn.Module) -> ModelGraph:
    graph = ModelGraph(model, (IMAGES[:2],))
    attach(model, graph.record)
    return graph


def table(path: Path, **ms: float) -> str:
    """Milliseconds by tile and bits, such as F4_8 or direct; the same for both layers."""
    shape = Shape(in_channels=8, out_channels=8, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), groups=1, map=(8, 8))
    rows = []
    for (tile, bits), name in {
        (t, b): ("direct" if t == "direct" else f"F{t}") + (f"_{b}" if b else "")
        for t in ("direct", 2, 4, 6)
        for b in (None, 2, 8, 16)
    }.items():
        for kernel in ((3, 3), (1, 1)):
            one = shape.model_copy(update={"kernel": kernel})
            rows.append(Row(shape=one, tile=tile, bits=bits, ms=ms.get(name, 1.0)))
    LatencyTable(environment={"processor": "a test"}, batch=1, threads=1, rows=tuple(rows)).save(path)
    return str(path)


item = st.tuples(st.integers(1, 20).map(float), st.integers(-5, 20).map(float))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(item, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 80))
def test_the_knapsack_is_exact(rows: list[list[tuple[float, float]]], budget: int) -> None:
    named = [[(*one, place) for place, one in enumerate(row)] for row in rows]
    costs = {
        choice: tuple(sum(row[place][i] for row, place in zip(rows, choice, strict=True)) for i in (0, 1))
        for choice in itertools.product(*(range(len(row)) for row in rows))
    }
    possible = {choice: one for choice, one in costs.items() if one[0] <= budget}
    if not possible:
        with pytest.raises(ValueError, match="nothing costs"):
            best_under(named, budget)
        return
    found = tuple(best_under(named, budget))
    assert possible[found][1] == min(one[1] for one in possible.values())


def test_many_rows_stay_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        [(float(c), float(v), p) for p, (c, v) in enumerate(torch.rand(8, 2, generator=generator))] for _ in range(60)
    ]
    found = best_under(rows, 20.0)
    assert sum(row[p][0] for row, p in zip(rows, found, strict=True)) <= 20.0
    greedy = sum(min(row)[1] for row in rows)
    assert sum(row[p][1] for row, p in zip(rows, found, strict=True)) < 0.6 * greedy


def test_the_knapsack_takes_what_is_cheap_and_harmless(tmp_path: Path) -> None:
    model, done = net(), context()
    before = model(IMAGES)
    # F6 in floating point costs nothing in loss; few bits are no faster.
    where = table(tmp_path / "t.json", F2=0.6, F4=0.4, F6=0.2, F6_8=0.2)
    method = WinogradKnapsack(bits=(None, 8), latency=where, share=0.5)
    method.apply(graph_of(model), done)
    layers = dict(model.named_modules())
    for name in ("a", "b"):
        layer = layers[name]
        assert isinstance(layer, WinogradConv2d)
        assert (layer.settings.tile, layer.settings.quantization) == (6, None)
    assert type(layers["stem"]) is nn.Conv2d
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), before, rtol=1e-3, atol=1e-4)
    text = "\n".join(done.notes)
    assert "latency of 3 layers by the table: 3.000 -> 1.400 ms (47%)" in text
    assert "a: F6 in floating point, 1.000 -> 0.200 ms" in text
    assert "a test" in text


def test_a_tight_budget_takes_the_less_harmful_bits(tmp_path: Path) -> None:
    """16 bits and 2 bits cost the same time: nobody takes 2."""
    model, done = sure()
    where = table(tmp_path / "t.json", direct_2=0.3, direct_16=0.3)
    WinogradKnapsack(tiles=("direct",), bits=(None, 2, 16), latency=where, share=0.3).apply(graph_of(model), done)
    for name in ("a", "b", "point"):
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedConv2d)
        assert layer.quantization.input is not None
        assert layer.quantization.input.bits == 16
    with torch.no_grad():
        model(IMAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.1}, r"the fastest candidates take 2\.000 ms, 100% .* out of reach"),
        ({"include": ("nowhere",)}, "unknown layer 'nowhere'"),
        ({"tiles": ("direct",)}, "no layer is left for winograd_knapsack: none has more than one candidate"),
        ({"bits": (None, 4)}, "the latency table has no row for tile direct at 4 bits"),
        ({"latency": "nowhere.json"}, "nowhere.json is no latency table"),
    ],
)
def test_what_can_not_be_done_changes_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = net()
    graph = graph_of(model)
    given_: dict[str, Any] = {"latency": table(tmp_path / "t.json"), "bits": (None,)} | changes
    with pytest.raises(TersenetError, match=message):
        WinogradKnapsack(**given_).apply(graph, context())
    with pytest.raises(TersenetError, match="measures on training images"):
        WinogradKnapsack().apply(graph, Context(CPU, 0))
    assert all(type(m) is not WinogradConv2d for m in model.modules())
    assert graph.record.edits == ()


def searched(
    where: str, checkpoint: Path | None, stop: int | None = None, **more: Any
) -> tuple[nn.Module, Any, list[Any]]:
    """A search, which an error ends after epoch `stop`."""
    model, done = net(), context()
    graph = graph_of(model)
    method = Winas(fit={**FIT, "optimizer": "sgd"}, latency=where, **({"logits_lr": 0.1} | more))  # pyright: ignore
    method.apply(graph, done)
    hooks = method.hooks(graph, done)

    def log(row: dict[str, Any]) -> None:
        if row["kind"] == "epoch" and row["epoch"] == stop:
            raise KeyboardInterrupt

    assert done.data is not None
    rows = fit(model, done.data, method.fit, seed=1, device=CPU, hooks=hooks, checkpoint=checkpoint, log=log)
    method.finish(graph, done, hooks)
    return model, done, rows


def test_the_search_finds_what_is_fast(tmp_path: Path) -> None:
    where = table(tmp_path / "t.json", F4=0.1)
    model, done, rows = searched(where, None, latency_weight=10.0)
    for name in ("a", "b"):
        layer = model.get_submodule(name)
        assert isinstance(layer, WinogradConv2d)
        assert layer.settings.tile == 4
    assert "paths" not in str(list(model.state_dict()))
    assert rows[1]["expected_latency"] < rows[0]["expected_latency"] < 1
    assert rows[1]["chosen_latency"] == pytest.approx(0.1)
    assert any(note.startswith("a: F4 in floating point, 1.000 -> 0.100 ms, chosen with") for note in done.notes)
    record = record_of(model)
    assert record is not None
    assert [edit.kind for edit in record.edits] == ["winograd", "winograd"]
    with torch.no_grad():
        assert model(IMAGES).isfinite().all()


def test_the_search_prefers_what_is_accurate(tmp_path: Path) -> None:
    """Without a weight on latency, two bits lose against floating point."""
    where = table(tmp_path / "t.json")
    model, done = sure()
    assert done.data is not None
    graph = graph_of(model)
    method = Winas(
        fit=Fit(epochs=6, lr=1e-6), latency=where, latency_weight=0, tiles=("direct",), bits=(None, 2), logits_lr=0.1
    )
    hooks = method.hooks(graph, done)
    fit(model, done.data, method.fit, seed=1, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
    shares = hooks.probabilities()  # pyright: ignore
    assert sum(share[0] for share in shares.values()) / len(shares) > 0.5
    hooks.close()  # pyright: ignore


def test_the_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    where = table(tmp_path / "t.json", F4=0.5, F2_8=0.2, F4_8=0.2)
    whole, _, rows = searched(where, None, bits=(None, 8))
    with pytest.raises(KeyboardInterrupt):
        searched(where, tmp_path / "c.pt", stop=0, bits=(None, 8))
    resumed, _, again = searched(where, tmp_path / "c.pt", bits=(None, 8))
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_table_is_measured_once_and_says_where() -> None:
    model = net()
    found = tersenet.latency_table(model, IMAGES[:2], bits=(None, 8))
    assert found == tersenet.latency_table(copy.deepcopy(model), IMAGES[:2], bits=(None, 8))
    kinds = {(row.shape.kernel, row.tile, row.bits) for row in found.rows}
    assert {((3, 3), 4, None), ((3, 3), "direct", 8), ((1, 1), "direct", None)} <= kinds
    assert ((1, 1), 2, None) not in kinds
    assert all(row.kernel for row in found.rows)
    assert found.environment["processor"]
    assert measure_table([]).rows == ()


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tersenet.cli.main import app

    out = CliRunner().invoke(app, ["winograd", "latency", "lenet5", "--out", str(tmp_path / "t.json"), "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["rows"]
    assert LatencyTable.load(tmp_path / "t.json").batch == 1


@pytest.mark.slow
def test_all_ranks_choose_and_train_alike(tmp_path: Path) -> None:
    """Each has other images, and a latency table of its own, as measuring gives."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    script = Path(__file__).with_name("winograd_on_a_rank.py")
    done = subprocess.run(
        [sys.executable, *command, "--master-port", port, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert set(first) == {"winas", "winograd_knapsack", "winograd_aware"}
    # F4 is fast in the first rank's table, F2 in the other's.
    assert 4 in first["winograd_knapsack"]["layers"].values()
    assert first["winograd_aware"]["layers"] == {"a": 4, "b": 4}


def test_transforms_are_trained_once_it_is_chosen(tmp_path: Path) -> None:
    """A search would train transforms of layers that are then made anew."""
    method = Winas(fit=Fit(**FIT), latency=table(tmp_path / "t.json", F4=0.1), flex="full", tiles=(4,))
    model, done = net(), context()
    graph = graph_of(model)
    hooks: Any = method.hooks(graph, done)
    searched = {name for name, _ in model.named_parameters()}
    assert not any("transforms" in name for name in searched)
    method.finish(graph, done, hooks)
    trained = {name for name, _ in model.named_parameters()}
    assert {f"{layer}.transforms.at" for layer in ("a", "b")} <= trained
