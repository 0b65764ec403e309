"""`tersenet bench`: what it says and what it refuses; never the times themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.cli.main import main
from tersenet.lowering.bench import Timing, bench
from tersenet.lowering.peers import PEERS, Runner
from tersenet.lowering.picture import draw


def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "resnet8", "--rounds", "2", "--peer", "eager", "--threads", "1", "--json"])
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["timings"].keys() == {"tersenet", "eager"}
    assert document["threads"] == 1
    assert all(layer["times"] for layer in document["lowered"]["layers"])
    for timing in document["timings"].values():
        assert 0 < timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
        assert timing["error"] < 1e-3


@pytest.mark.parametrize(
    ("peer", "packages"),
    [
        ("onnxruntime", ["onnxscript", "onnxruntime"]),
        ("openvino", ["onnxscript", "openvino"]),
        ("ncnn", ["ncnn", "pnnx"]),
        ("mnn", ["onnxscript", "onnxruntime", "MNN"]),
    ],
)
def test_a_runtime_computes_the_same(peer: str, packages: list[str]) -> None:
    for package in packages:
        pytest.importorskip(package)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4))
    found, _ = bench(model, (torch.randn(2, 3, 9, 9),), peers=(peer,), rounds=1)
    assert found.missing == {}
    assert found.timings[peer].error < 1e-5


@pytest.mark.parametrize(("peer", "packages"), [("eager", []), ("openvino", ["onnxscript", "openvino"])])
def test_bfloat16_on_both_sides(peer: str, packages: list[str]) -> None:
    for package in packages:
        pytest.importorskip(package)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4))
    found, _ = bench(model, (torch.randn(2, 3, 9, 9),), peers=(peer, "onnxruntime"), rounds=1, half=True)
    assert found.half
    assert "bfloat16" in found.missing["onnxruntime"]
    assert found.timings[peer].error < 2e-2
    if peer == "eager":
        assert found.timings[peer].error > 1e-4


def test_a_runtime_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Runner:
        raise RuntimeError("no such device\nmore")

    monkeypatch.setitem(PEERS, "openvino", broken)
    found, _ = bench(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 9, 9),), peers=("openvino",), rounds=1)
    assert found.missing == {"openvino": "no such device"}
    assert found.timings.keys() == {"tersenet"}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_picture(suffix: str, tmp_path: Path) -> None:
    timings = {"tersenet": Timing(1.5, 1.0, 2.0, 1e-7), "eager": Timing(12.25, 12.0, 13.0, 0.0)}
    path = tmp_path / f"bars{suffix}"
    draw({"net, batch 1": timings, "net, batch 8": timings}, path)
    first = path.read_bytes()
    if suffix == ".svg":
        text = first.decode()
        assert all(word in text for word in ("tersenet", "eager", "net, batch 8", "12.2"))
    else:
        assert first.startswith(b"\x89PNG")
    draw({"net, batch 1": timings, "net, batch 8": timings}, path)
    assert path.read_bytes() == first


def test_a_picture_of_another_kind_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "no_such_network", "--picture", "bars.jpg"])
    assert ended.value.code != 0
    assert "must end in .svg or .png" in capsys.readouterr().err


def test_bad_arguments() -> None:
    x = (torch.randn(1, 3, 9, 9),)
    before = torch.get_num_threads()
    with pytest.raises(tn.TersenetError, match="unknown runtime 'openvno'; did you mean 'openvino'"):
        bench(nn.Conv2d(3, 4, 3), x, peers=("openvno",))
    with pytest.raises(tn.TersenetError, match=r"rounds \(=0\)"):
        bench(nn.Conv2d(3, 4, 3), x, rounds=0)
    with pytest.raises(tn.TersenetError, match=r"torch\.export"):
        bench(nn.Conv2d(4, 4, 3), x, threads=2)
    assert torch.get_num_threads() == before
