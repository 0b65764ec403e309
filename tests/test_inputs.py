"""What a user's own network takes: said once, kept in the artifact, used by whatever runs the network later."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersenet as tn
from run_support import json_of, loaders
from tersenet.cli.main import main
from tersenet.errors import TersenetError
from tersenet.graph.record import InputSpec, TensorSpec, record_of
from tersenet.models.open import example_of

HALF = {"steps": [{"method": "magnitude", "rate": 0.5}]}
Cli = Callable[..., dict[str, Any]]


class Fused(nn.Module):
    """Two images of different size and a class number, as in a network that fuses sensors."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(3, 8, 3, padding=1)
        self.far = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.kind = nn.Embedding(5, 8)
        self.mix = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, near: Tensor, far: Tensor, kind: Tensor) -> Tensor:
        x = self.near(near) + self.far(far)
        x = x * self.kind(kind)[:, :, None, None].sigmoid()
        return self.head(self.mix(x.relu()).relu().mean((2, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(y)).relu())


def pair() -> nn.Module:
    """For `test_inputs:pair` on the command line."""
    torch.manual_seed(2)
    return Pair()


def example(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 3, 8, 8), torch.randn(batch, 1, 16, 16), torch.randint(5, (batch,))


SPEC = InputSpec(shape=(3, 8, 8), more=(TensorSpec(shape=(1, 16, 16)), TensorSpec(shape=(), kind="int64")))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)

    return partial(json_of, capsys)


def test_several_inputs_are_compressed_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Fused()
    result = tn.compress(model, HALF, example=example(), device="cpu", out=tmp_path / "run")
    assert result.report.after.macs < 0.7 * result.report.before.macs
    assert result.report.before.macs == tn.measure(model, example(1)).macs
    record = record_of(tn.load(tmp_path / "run" / "model", base=Fused()))
    assert record is not None
    assert record.input == SPEC
    loaded = tn.load(tmp_path / "run", base=Fused())
    assert [(x.shape, x.dtype) for x in example_of(loaded, 3)] == [(x.shape, x.dtype) for x in example(3)]
    assert torch.equal(loaded(*example(3)), result.model(*example(3)))
    # What was saved says what it takes: a second compression needs no example.
    again = tn.compress(loaded, HALF, device="cpu")
    assert again.report.before.macs == result.report.after.macs > again.report.after.macs
    # The same call finds its run; one of other inputs is another run.
    assert tn.compress(alike(model), HALF, example=example(1), device="cpu", out=tmp_path / "run").report
    other = (torch.zeros(1, 3, 10, 10), torch.zeros(1, 1, 20, 20), torch.zeros(1, dtype=torch.long))
    with pytest.raises(TersenetError, match=r"holds another run: inputs\.shape\.1 is 8 there and 10 here"):
        tn.compress(alike(model), HALF, example=other, device="cpu", out=tmp_path / "run")


def alike(model: nn.Module) -> nn.Module:
    made = Fused()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_several_inputs_are_exported(tmp_path: Path, ending: str) -> None:
    small = tn.compress(Fused(), HALF, example=example(), device="cpu").model
    path = tmp_path / f"net.{ending}"
    if ending == "pt2":
        tn.export(small, path, example())
        found = torch.export.load(path).module()(*example(5))
    else:
        for package in ("onnx", "onnxscript"):
            pytest.importorskip(package)
        runtime = pytest.importorskip("onnxruntime")
        tn.export(small, path, example())
        session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        feed = dict(zip((x.name for x in session.get_inputs()), (x.numpy() for x in example(5)), strict=True))
        found = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(found, small(*example(5)).detach(), rtol=1e-4, atol=1e-5)


def test_the_command_line_takes_an_input_for_each_and_remembers_them(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text(json.dumps(HALF))
    sizes = ("--input", "3x6x6", "--input", "1x6x6")
    report = cli("compress", "test_inputs:pair", "--recipe", "half.yaml", *sizes, "--out", "run", "--device", "cpu")
    assert report["before"]["macs"] == 36 * 8 * 27 + 36 * 8 + 16 * 4 * 72
    base = ("--base", "test_inputs:pair")
    own, larger = cli("measure", "run", *base), cli("measure", "run", *base, "--input", "3x9x9", "--input", "1x9x9")
    assert own["macs"] == report["after"]["macs"] < larger["macs"]
    assert (own["input"], own["more_inputs"]) == ([1, 3, 6, 6], [[1, 1, 6, 6]])
    cli("export", "run", "net.pt2", *base)
    outputs = torch.export.load(tmp_path / "net.pt2").module()(torch.zeros(5, 3, 6, 6), torch.zeros(5, 1, 6, 6))
    assert outputs.shape == (5, 4, 4, 4)


def test_a_networks_input_is_never_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TersenetError, match=r"Fused is your own network.*give data, example=\(x,\) or input_shape="):
        tn.compress(Fused(), HALF, device="cpu")
    for command in (["compress", "test_inputs:pair", "--recipe", "magnitude"], ["measure", "test_inputs:pair"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 1
        assert "error: test_inputs:pair is your own network, and what it takes is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_shape": (3, 64, 64), "example": torch.zeros(1, 3, 64, 64)}, "say the same thing: give one"),
        ({"input_shape": (3, 0, 64)}, r"input_shape \(=\(3, 0, 64\)\) must be the sizes"),
        ({"input_shape": "3x64x64"}, r"input_shape \(='3x64x64'\) must be the sizes"),
        ({"input_shape": 64}, r"input_shape \(=64\) must be the sizes"),
        ({"input_shape": [(3, 8, 8), 4]}, r"input_shape \(=\[\(3, 8, 8\), 4\]\) must be the sizes"),
        ({"example": ()}, "an example of 0 inputs; an example is a tensor, or a tuple of tensors"),
        ({"example": {"x": torch.zeros(1, 3)}}, "input 0 of the example is a dict; .*calls yours"),
        ({"example": (torch.zeros(2, 3, 8, 8), 0.5)}, "input 1 of the example is a float;"),
        ({"example": torch.tensor(1.0)}, r"input 0 of the example has shape \(\);"),
        ({"example": (torch.zeros(2, 3, 8, 8), torch.zeros(3, 3))}, "has a batch of 3, input 0 one of 2"),
        ({"example": torch.zeros(2, 3, 0, 8)}, r"has shape \(2, 3, 0, 8\);.*sizes 1 to 65536"),
        ({"example": (torch.zeros(2), torch.zeros(2, 3))}, "put an input of more than one axis first"),
        (
            {"example": torch.zeros(1, 3, 8, 8, dtype=torch.complex64)},
            "input 0 of the example is torch.complex64; known",
        ),
        (
            {"input_shape": (3, 8, 8), "data": loaders()},
            r"the data's samples have shape \(1, 8, 8\), and .* \(3, 8, 8\)",
        ),
    ],
)
def test_examples_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        tn.compress(pair(), HALF, device="cpu", **given)


def test_one_input_is_a_tensor_a_tuple_or_a_shape() -> None:
    net = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3))
    for given in ({"example": torch.zeros(4, 2, 9)}, {"example": (torch.zeros(1, 2, 9),)}, {"input_shape": [2, 9]}):
        result = tn.compress(net.double(), HALF, device="cpu", **given)
        record = record_of(result.model)
        assert record is not None
        assert record.input == InputSpec(shape=(2, 9))
        assert result.report.after.macs == (7 * 3 * 2 * 3) + (5 * 4 * 3 * 3)
