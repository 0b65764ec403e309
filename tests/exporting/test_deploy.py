"""Winograd and quantized layers as they are deployed: folded, in integers (fact W15), plain, and in ONNX with QDQ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersenet
from tersenet.errors import TersenetError
from tersenet.exporting.deploy import folded, integers, plain_convolutions
from tersenet.exporting.qdq import METADATA
from tersenet.nn.folded import FoldedConv2d, FoldedWinogradConv2d
from tersenet.nn.integer import IntegerConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d, calibration
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.nn.winograd_settings import Flex, Quantization, Quantizer, WinogradSettings
from tersenet.ops.fixed_point import fixed_point, rescaling, shifted

KINDS: dict[str, Quantization] = {
    "tapwise": Quantization.tapwise(8),
    "ten bits": Quantization.tapwise(8, 10, power_of_two=True),
    "reference": Quantization.reference(8),
    "per channel": Quantization.tapwise(8).model_copy(
        update={
            "weight_winograd": Quantizer(bits=8, per="tap_channel"),
            "product": Quantizer(bits=8, per="tap_channel"),
            "weight": Quantizer(bits=6, per="channel"),
        }
    ),
}
SHAPES: tuple[dict[str, Any], ...] = (
    {"padding": 1},
    {"padding": 1, "stride": 2, "groups": 2},
    {"padding": 2, "dilation": 2, "padding_mode": "reflect", "bias": False},
)


def images(n: int = 4, seed: int = 0, channels: int = 8) -> Tensor:
    return torch.randn(n, channels, 11, 9, generator=torch.Generator().manual_seed(seed)).relu()


def ranged(model: nn.Module) -> nn.Module:
    """With ranges as training leaves them: no value lies where one range is a small fraction of another."""
    model.train()
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.settings = module.settings.model_copy(update={"momentum": 0.3})
    with torch.no_grad():
        for seed in range(1, 4):
            model(images(seed=seed, channels=next(model.parameters()).shape[1] * getattr(model, "groups", 1)))
    return model.eval()


def winograd(tile: int, kind: str, flex: Flex = "static", **shape: Any) -> WinogradConv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, **shape)
    layer = WinogradConv2d.from_conv(conv, WinogradSettings(tile=tile, flex=flex, quantization=KINDS[kind]))
    with torch.no_grad():
        for parameter in layer.transforms.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return ranged(layer)  # pyright: ignore[reportReturnType]


def direct(per: str = "tensor", **shape: Any) -> QuantizedConv2d:
    torch.manual_seed(0)
    kind = Quantization(
        input=Quantizer(bits=8), weight=Quantizer.model_validate({"bits": 8, "per": per}), output=Quantizer(bits=8)
    )
    return ranged(QuantizedConv2d.from_conv(nn.Conv2d(8, 12, (3, 2), **shape), kind))  # pyright: ignore[reportReturnType]


LAYERS = [(tile, kind, flex) for tile in (2, 4, 6) for kind in KINDS for flex in ("static", "full")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tile", "kind", "flex"), LAYERS)
def test_integers_give_the_fake_quantized_levels(tile: int, kind: str, flex: Any, shape: dict[str, Any]) -> None:
    """Fact W15."""
    layer = winograd(tile, kind, flex, **shape)
    whole = IntegerConv2d(layer)
    with torch.no_grad():
        expected, found = layer(images()), whole(images())
    difference = ((found - expected) / whole.output.scale).abs()
    assert float(difference.max()) < 1.01
    # Next to all are the very same.
    assert float((difference > 0.5).float().mean()) < 0.02
    assert float(found.std()) > 0.1


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [*SHAPES, {"padding": (1, 0), "groups": 4}, {"padding": "same"}])
def test_integers_of_a_direct_convolution(per: str, shape: dict[str, Any]) -> None:
    layer = direct(per, **shape)
    whole = IntegerConv2d(layer)
    with torch.no_grad():
        expected, found = layer(images()), whole(images())
        assert torch.equal(folded(nn.Sequential(layer))(images()), expected)
    difference = ((found - expected) / whole.output.scale).abs()
    assert float(difference.max()) < 1.01
    assert float((difference > 0.5).float().mean()) < 0.02


def test_nothing_but_integers_between_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = IntegerConv2d(winograd(4, "tapwise", padding=1))
    levels = whole.input.integers(images())
    assert levels.dtype == torch.int8
    assert {name: b.dtype for name, b in whole.named_buffers() if b.is_floating_point()}.keys() == {
        "input.scale", "input_winograd.scale", "product.scale", "output.scale",
    }  # fmt: skip
    for scale in (whole.input.scale, whole.product.scale, whole.output.scale):  # pyright: ignore
        scale.fill_(float("nan"))
    seen: list[torch.dtype] = []
    bmm = torch.bmm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a.dtype)
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    out = whole.integers(levels)
    assert (out.dtype, seen) == (torch.int8, [torch.int32])
    assert len(out.unique()) > 50


@settings(deadline=None, max_examples=100)
@given(st.integers(-(2**40), 2**40), st.integers(0, 30))
def test_shifts_round_as_python_does(value: int, shift: int) -> None:
    from fractions import Fraction

    assert int(shifted(torch.tensor([value]), shift)[0]) == round(Fraction(value, 2**shift))


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-9, 1e9), st.integers(1, 2**30 - 1))
def test_factors_are_near(factor: float, value: int) -> None:
    given_ = torch.tensor([factor], dtype=torch.float64)
    values, shift = fixed_point(given_, 62)
    assert abs(float(values[0]) / 2**shift / factor - 1) < 2**-29
    if factor < 1e6 and value * factor < 2**31:
        # Sums of more than 31 bits lose their last ones.
        for bits, lost in ((30, 0), (40, 2**10)):
            found = int(rescaling(given_, 2.0**bits - 1)(torch.tensor([value]))[0])
            assert abs(found - value * factor) <= 0.5 + 2**-29 * value * factor + lost * factor


def test_a_power_of_two_is_exact() -> None:
    values, shift = fixed_point(torch.tensor([0.25, 3.0], dtype=torch.float64), 30)
    assert (values.tolist(), shift) == ([1, 12], 2)
    with pytest.raises(TersenetError, match="does not fit into 8 bits"):
        fixed_point(torch.tensor([1000.0], dtype=torch.float64), 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tile", "kind", "flex"), LAYERS)
def test_folding_changes_no_bit(tile: int, kind: str, flex: Any, shape: dict[str, Any]) -> None:
    layer = winograd(tile, kind, flex, **shape)
    model = nn.Sequential(layer)
    ready = folded(model)
    with torch.no_grad():
        assert torch.equal(ready(images()), model(images()))
    assert model[0] is layer
    part = ready[0]  # pyright: ignore
    assert isinstance(part, FoldedWinogradConv2d)
    assert (part.weight.dtype, part.weight.shape[0]) == (torch.int8, (tile + layer.geometry.taps - 1) ** 2)
    assert not list(ready.parameters())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_folding_changes_no_bit_in_other_types(kind: torch.dtype) -> None:
    model = nn.Sequential(winograd(4, "tapwise", padding=1)).to(kind)
    x = images().to(kind)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(folded(model)(x), expected)
        assert folded(model)(x).dtype == kind
        narrow = nn.Sequential(direct(padding=1).to(kind))
        assert torch.equal(folded(narrow)(x), narrow(x))


def test_exact_layers_in_floating_point_become_convolutions() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
    flexes: list[Flex] = ["static", "points", "full"]
    swapped = [WinogradConv2d.from_conv(c, WinogradSettings(flex=f)) for c, f in zip(layers, flexes, strict=True)]
    model = nn.Sequential(*swapped, swapped[0]).eval()
    ready = folded(model)
    assert [type(m) for m in ready] == [nn.Conv2d, nn.Conv2d, WinogradConv2d, nn.Conv2d]  # pyright: ignore
    assert ready[0] is ready[3]  # pyright: ignore
    with torch.no_grad():
        torch.testing.assert_close(ready(images()), model(images()), rtol=1e-4, atol=1e-5)
    with pytest.raises(TersenetError, match=r"^2 has transforms that were trained freely"):
        plain_convolutions(model)
    quantized = nn.Sequential(winograd(4, "tapwise", padding=1))
    assert type(plain_convolutions(quantized)[0]) is nn.Conv2d  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": None}, "^0: its product is not quantized"),
        ({"input": Quantizer(bits=20)}, "^0: its input has 20 bits; integers here have at most 16"),
        (
            {"input_winograd": Quantizer(bits=8, per="tap_channel")},
            "^0: the transformed input has one scale per tap and",
        ),
    ],
)
def test_what_integers_can_not_do(change: dict[str, Any], message: str) -> None:
    made = WinogradSettings(quantization=KINDS["tapwise"].model_copy(update=change))
    model = nn.Sequential(ranged(WinogradConv2d.from_conv(nn.Conv2d(8, 8, 3), made)))
    with pytest.raises(TersenetError, match=message):
        integers(model)
    # But folded it can be.
    with torch.no_grad():
        assert torch.equal(folded(model)(images()), model(images()))


def test_a_quantizer_that_has_seen_nothing_is_named() -> None:
    fresh = WinogradConv2d.from_conv(nn.Conv2d(8, 8, 3), WinogradSettings(quantization=KINDS["tapwise"]))
    with pytest.raises(TersenetError, match=r"^0: the quantizer of the .* has no range yet"):
        folded(nn.Sequential(fresh).eval())


def test_an_exported_program_holds_integers_and_needs_no_tersenet(tmp_path: Path) -> None:
    model = nn.Sequential(winograd(4, "tapwise", padding=1), nn.ReLU())
    tersenet.export(model, tmp_path / "net.pt2", images(2))
    program = torch.export.load(tmp_path / "net.pt2")
    assert program.state_dict["0.weight"].dtype == torch.int8
    assert not [node for node in program.graph.nodes if "tersenet" in str(node.target)]
    with torch.no_grad():
        assert torch.equal(program.module()(images(3)), model(images(3)))
    with pytest.raises(TersenetError, match=r"quantized \(='int8'\) must be one of folded, plain"):
        tersenet.export(model, tmp_path / "net.pt2", images(2), quantized="int8")  # pyright: ignore


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Sequential, Path]:
    """A network with a Winograd and a direct layer, and the ONNX file of it."""
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = nn.Sequential(winograd(4, "tapwise", padding=1), nn.ReLU())
    eight = Quantizer(bits=8)
    kind = Quantization(input=eight, weight=Quantizer(bits=8, per="channel"), output=eight)
    layer = QuantizedConv2d.from_conv(nn.Conv2d(12, 8, 3, 2), kind)
    with torch.no_grad(), calibration(layer):
        layer(model(images()))
    model.append(layer.eval())
    path = tmp_path_factory.mktemp("qdq") / "net.onnx"
    tersenet.export(model, path, images(2))
    return model, path


def run(path: Path, x: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_runtimes_give_the_fake_quantized_outputs(file: tuple[nn.Sequential, Path]) -> None:
    model, path = file
    step = float(model[2].quantizers["output"].stage()[1])  # pyright: ignore
    for n in (1, 5):
        with torch.no_grad():
            expected = model(images(n, seed=9))
        difference = (run(path, images(n, seed=9)) - expected).abs() / step
        # Sums in another order: some values are a level away.
        assert float(difference.max()) < 3.01
        assert float((difference > 0.5).float().mean()) < 0.02


def test_scales_and_integer_weights_can_be_read(file: tuple[nn.Sequential, Path]) -> None:
    """By a runtime of its own: the layer is computed from nothing but the file."""
    onnx = pytest.importorskip("onnx")
    model, path = file
    proto = onnx.load(str(path))
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("QuantizeLinear") == 6
    assert kinds.count("DequantizeLinear") == 8
    (entry,) = proto.metadata_props
    assert entry.key == METADATA
    (layer,) = json.loads(entry.value)["layers"].values()
    stored = {x.name: onnx.numpy_helper.to_array(x) for x in proto.graph.initializer}
    u, t = stored[layer["weight"]], layer["m"] + layer["r"] - 1
    assert (u.dtype, u.shape) == (np.int8, (t * t, 1, 8, 12))

    def rounded(values: Any, stage: str) -> Any:
        found = layer[stage]
        scale = np.asarray(found["scale"])
        scale = scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.size > 1 else scale
        high = 2 ** (found["bits"] - 1)
        return (values / scale).round().clip(-high, high - 1) * scale

    x = rounded(np.pad(images(1).numpy()[0].astype(np.float64), ((0, 0), (1, 8), (1, 8))), "input")
    at, bt = np.asarray(layer["at"]), np.asarray(layer["bt"])
    scale = np.asarray(layer["weight_winograd"]["scale"]).reshape(-1, 1, 1)
    y = np.zeros((12, 12, 12))
    for i in range(0, 12, 4):
        for j in range(0, 12, 4):
            tile = np.stack([bt @ channel[i : i + t, j : j + t] @ bt.T for channel in x]).reshape(8, -1).T
            v = rounded(tile[:, None], "input_winograd")
            m = rounded(v @ (u[:, 0] * scale), "product").reshape(t, t, 12)
            y[:, i : i + 4, j : j + 4] = np.einsum("ap,pqk,bq->kab", at, m, at)
    bias = model[0].bias.detach().numpy().reshape(-1, 1, 1)  # pyright: ignore
    found = rounded(y[:, :11, :9] + bias, "output")
    with torch.no_grad():
        expected = model[0](images(1))[0].numpy()  # pyright: ignore
    assert np.abs(found - expected).max() < 1.01 * layer["output"]["scale"]


def test_plain_convolutions(file: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, _ = file
    tersenet.export(model, tmp_path / "net.onnx", images(2), quantized="plain")
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node}
    assert kinds == {"Conv", "Relu"}
    first, last = model[0], model[2]  # pyright: ignore
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    expected = nn.functional.conv2d(images(3), first.weight, first.bias, padding=1).relu()
    expected = nn.functional.conv2d(expected, last.weight, last.bias, stride=2)
    torch.testing.assert_close(run(tmp_path / "net.onnx", images(3)), expected.detach(), rtol=1e-4, atol=1e-5)


def test_more_than_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = nn.Sequential(winograd(2, "ten bits", padding=1))
    tersenet.export(model, tmp_path / "net.onnx", images(2))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", images(3)), model(images(3)), rtol=0, atol=0.05)


def test_a_folded_layer_is_its_own_description() -> None:
    assert "F(4, 3), weight=(36, 1, 8, 12)" in repr(folded(nn.Sequential(winograd(4, "tapwise", padding=1))))
    assert isinstance(folded(nn.Sequential(direct()))[0], FoldedConv2d)  # pyright: ignore


def test_the_block_of_the_winograd_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods" / "winograd_aware.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert any(isinstance(module, WinogradConv2d) for module in names["net"].modules())
