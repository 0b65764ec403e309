"""ONNX files: equal outputs in ONNX Runtime at any batch size, or no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersenet
from run_support import Net, files
from tersenet.errors import GraphError, TersenetError
from tersenet.exporting import onnx as exporting

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")


class Two(nn.Module):
    """Two inputs, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": self.conv(x) + y, "pooled": [self.conv(x).mean((2, 3))]}


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = dict(zip([i.name for i in session.get_inputs()], [x.numpy() for x in inputs], strict=True))
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def test_any_batch_size_gives_equal_outputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Net().train()
    assert tersenet.export(model, tmp_path / "net.onnx", torch.zeros(1, 1, 8, 8)) == tmp_path / "net.onnx"
    assert model.training
    assert capfd.readouterr().out == ""
    assert files(tmp_path).keys() == {"net.onnx"}
    model.eval()
    for n in (1, 2, 5):
        x = torch.randn(n, 1, 8, 8)
        (found,) = run(tmp_path / "net.onnx", x)
        torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model = Two()
    tersenet.export(model, tmp_path / "net.onnx", (torch.zeros(1, 3, 6, 6), torch.zeros(1, 4, 6, 6)))
    x, y = torch.randn(3, 3, 6, 6), torch.randn(3, 4, 6, 6)
    total, pooled = run(tmp_path / "net.onnx", x, y)
    expected = model(x, y)
    torch.testing.assert_close(total, expected["sum"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected["pooled"][0].detach(), rtol=1e-4, atol=1e-5)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_can_not_be_equal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    with pytest.raises(GraphError, match="Counts can't be exported"):
        tersenet.export(Counts(), tmp_path / "net.onnx", torch.ones(1, 2))
    linear = nn.Linear(2, 2)
    other = exporting._converted(linear, exporting.exported(linear, exporting.batches((torch.zeros(1, 2),))))
    monkeypatch.setattr(exporting, "_converted", lambda *_: other)
    with pytest.raises(GraphError, match="ONNX Runtime's outputs differ at batch size 2") as caught:
        tersenet.export(nn.Linear(2, 2), tmp_path / "net.onnx", torch.ones(1, 2))
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(exporting, "_installed", lambda package: package != missing)
    with pytest.raises(
        TersenetError, match=rf"needs {missing}, which is not installed: pip install 'tersenet\[onnx\]'"
    ):
        tersenet.export(nn.Linear(2, 2), tmp_path / "net.onnx", torch.ones(1, 2))


def test_a_full_disk(small_disk: Path) -> None:
    (small_disk / "net.onnx").write_bytes(b"old")
    with pytest.raises(TersenetError, match=r"could not write .*net\.onnx: No space left on device"):
        tersenet.export(nn.Linear(400, 400), small_disk / "net.onnx", torch.zeros(1, 400))
    assert files(small_disk) == {"net.onnx": b"old"}


class Classes(nn.Module):
    """Numbers, and the classes that they say."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.argmax(1)


def test_a_quantized_network_may_give_integers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "is_quantized", lambda _: True)  # pyright: ignore[reportUnknownLambdaType]
    batch = (torch.eye(4),)
    wanted = [*Classes()(*batch)]
    near, far = ([(x * by).numpy() for x in wanted] for by in (1.01, 1.2))
    alike = exporting._as_near_as_itself  # pyright: ignore[reportPrivateUsage]
    assert alike(Classes(), batch, near, wanted)
    assert not alike(Classes(), batch, far, wanted)
    assert not alike(Classes(), batch, [wanted[0].numpy(), wanted[1].numpy()[::-1]], wanted)
