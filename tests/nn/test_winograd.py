"""The layer: a convolution with exact transforms, trainable transforms, quantizers and what they remember."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.winograd import WinogradConv2d, calibration
from tersenet.nn.winograd_error import layer_error
from tersenet.nn.winograd_settings import Flex, Quantization, Quantizer, WinogradSettings
from tersenet.ops.cook_toom import cook_toom

FLEX: list[Flex] = ["static", "full", "diagonal", "points"]
REFERENCE, TAPWISE = Quantization.reference(8), Quantization.tapwise(8)


def changed(quantization: Quantization, **update: Any) -> Quantization:
    """Every quantizer of it with these fields."""
    return Quantization(**{n: q.model_copy(update=update) for n, q in quantization if q is not None})


LEARNED, POWERS = changed(TAPWISE, scale="learned"), changed(TAPWISE, power_of_two=True)
CHANNELS = TAPWISE.model_copy(
    update={
        "weight": Quantizer(bits=8, per="channel"),
        "input_winograd": Quantizer(bits=8, per="tap_channel"),
        "weight_winograd": Quantizer(bits=8, per="tap_channel", clip_gradient=True),
        "product": Quantizer(bits=10, per="tap_channel"),
    }
)
ALL = {
    "none": None,
    "reference": REFERENCE,
    "tapwise": TAPWISE,
    "learned": LEARNED,
    "channels": CHANNELS,
    "pot": POWERS,
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def layer(
    quantization: Quantization | None = None, seed: int = 0, **settings: Any
) -> tuple[WinogradConv2d, Tensor, Tensor]:
    """A layer, an input, and the output of the direct convolution."""
    torch.manual_seed(seed)
    conv, x = nn.Conv2d(16, 12, 3, padding=1), torch.randn(2, 16, 11, 14).relu()
    made = WinogradConv2d.from_conv(conv, WinogradSettings(quantization=quantization, **settings))
    return made, x, conv(x).detach()


@pytest.mark.parametrize("flex", FLEX)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding="same", bias=False),
        nn.Conv2d(4, 6, 5, 2, 2, groups=2),
        nn.Conv2d(4, 6, (3, 5), (1, 2), (0, 2), (2, 1)),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    ],
    ids=str,
)
def test_any_convolution(conv: nn.Conv2d, flex: Flex) -> None:
    """W10: the very weights, the same output, in training mode and out of it; one image without a batch too."""
    made = WinogradConv2d.from_conv(conv.double().eval(), WinogradSettings(flex=flex))
    assert made.weight is conv.weight
    assert not made.training
    x = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    # What was trained in float32 keeps its rounding.
    assert relative(made(x), conv(x)) < (1e-6 if flex == "full" else 1e-10)
    torch.testing.assert_close(made(x[0]), made(x)[0])
    assert f"F(4, {made.geometry.taps}), {flex}" in repr(made)


def test_the_state_is_that_of_a_convolution() -> None:
    made, _, _ = layer()
    assert list(made.state_dict()) == ["weight", "bias"]
    trained, _, _ = layer(flex="full")
    parameters = sum(p.numel() for p in trained.transforms.parameters())
    # W9 counts them: 78 per layer for F4.
    assert parameters == 24 + 18 + 36


@pytest.mark.parametrize("flex", ["diagonal", "points"])
def test_the_exact_variants_stay_a_convolution(flex: Flex) -> None:
    made, x, expected = layer(flex=flex)
    made, x, expected = made.double(), x.double(), expected.double()
    conv = nn.functional.conv2d(x, made.weight, made.bias, padding=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.transforms.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert relative(made(x), conv) < 1e-10
    before = WinogradConv2d(16, 12, 3).transforms(torch.float64)
    assert not torch.allclose(made.transforms(torch.float64)[2], before[2])
    made.check("layer1")


def test_the_points_are_differentiated_correctly() -> None:
    made = WinogradConv2d(1, 1, 3, settings=WinogradSettings(flex="points", tile=6)).double().transforms

    def matrices(points: Tensor) -> tuple[Tensor, ...]:
        return made._from_points(points)

    exact = cook_toom(6, 3)
    for found, rows in zip(matrices(made.points), (exact.at, exact.g, exact.bt), strict=True):
        expected = torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(matrices, (made.points,))


def test_float32_with_large_tiles() -> None:
    """W1 of the layer, which has its matrices in float32: 2e-5 for F(6, 5)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 5, padding=2, bias=False)
    made = WinogradConv2d.from_conv(conv, WinogradSettings(tile=6))
    for side in (5, 12, 23, 30):
        x = torch.randn(4, 8, side, 35 - side)
        expected = nn.functional.conv2d(x.double(), conv.weight.double(), None, padding=2)
        assert relative(made(x).double(), expected) < 2e-5


@pytest.mark.parametrize("quantization", [None, REFERENCE, LEARNED])
@pytest.mark.parametrize("flex", ["full", "static"])
def test_full_transforms_train_and_static_ones_stay(quantization: Quantization | None, flex: Flex) -> None:
    """W4: finite gradients that are not zero and a change after one step, or none after ten."""
    made, x, _ = layer(quantization, flex=flex)
    matrices = made.transforms.at, made.transforms.g, made.transforms.bt
    before = [matrix.detach().clone() for matrix in matrices]
    optimizer = torch.optim.SGD(made.parameters(), 1e-4)
    for _ in range(1 if flex == "full" else 10):
        optimizer.zero_grad()
        made(x).square().sum().backward()
        for matrix in matrices:
            if flex == "static":
                assert matrix.grad is None
            else:
                assert matrix.grad is not None
                assert torch.isfinite(matrix.grad).all()
                assert matrix.grad.abs().max() > 0
        optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(matrices, before, strict=True)] == [flex == "static"] * 3


@pytest.mark.parametrize("name", ALL)
def test_evaluation_is_deterministic_and_changes_nothing(name: str) -> None:
    """W6, for every option; the reference's observers follow the test data with --warmup."""
    made, x, expected = layer(ALL[name])
    with calibration(made):
        made(x)
    made(x)
    made.eval()
    state = copy.deepcopy(made.state_dict())
    y = made(x)
    assert relative(y, expected) < (1e-5 if name == "none" else 1.5 if name == "reference" else 0.2)
    assert torch.equal(made(x + 0), y)
    made(100 * x)
    for key, value in made.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_training_moves_the_ranges_as_the_reference_does() -> None:
    """W5 in the layer: first batch as it is, then one percent of the way."""
    made, x, _ = layer(REFERENCE)
    made(x)
    observed: Any = made.quantizers["input"]
    assert observed.range.flatten().tolist() == pytest.approx([0, float(x.max())])
    made(-x)
    assert observed.range.flatten().tolist() == pytest.approx([-0.01 * float(x.max()), 0.99 * float(x.max())])
    assert len([m for m in made.modules() if hasattr(m, "rounding")]) == 9


def test_more_bits_are_better() -> None:
    """W7: monotone over bits; 24 bits are floating point."""
    for preset in (Quantization.reference, Quantization.tapwise):
        errors = []
        for bits in (4, 6, 8, 10, 16):
            made, x, expected = layer(preset(bits), tile=2)
            errors.append(relative(made(x), expected))
        assert errors == sorted(errors, reverse=True)
        made, x, expected = layer(preset(24), tile=2)
        assert relative(made(x), expected) < 1e-6


def test_one_scale_per_tap_and_better_points() -> None:
    """W12 and spec 0.4, with the reference's collapse."""
    errors = {
        (m, points, per_tap): layer_error(cook_toom(m, 3, points), 8, per_tap)
        for m, points in ((2, "lavin"), (4, "lavin"), (4, "balanced"), (6, "balanced"))
        for per_tap in (True, False)
    }
    assert errors[4, "lavin", True] <= 0.2
    assert errors[4, "balanced", True] < 0.8 * errors[4, "lavin", True]
    assert errors[4, "lavin", False] >= 10 * errors[4, "lavin", True]
    assert errors[4, "lavin", False] >= 1
    assert errors[4, "lavin", False] == pytest.approx(4.6, rel=0.25)
    assert errors[4, "balanced", False] == pytest.approx(1.09, rel=0.25)
    assert errors[6, "balanced", True] == pytest.approx(0.275, rel=0.15)
    widened, x, expected = layer(Quantization.tapwise(8, product_bits=10))
    assert relative(widened(x), expected) < relative(layer(TAPWISE)[0](x), expected)


@pytest.mark.parametrize(("m", "points", "limit"), [(2, "lavin", 0.033), (4, "balanced", 0.10)])
def test_one_layer_at_8_bits_is_as_good_as_specified(m: int, points: str, limit: float) -> None:
    """The mean of five draws; F4's are 0.096 to 0.101."""
    errors = [layer_error(cook_toom(m, 3, points), 8, seed=seed) for seed in range(5)]
    assert sum(errors) / 5 <= limit


def test_learned_scales_start_from_the_first_batch_and_learn() -> None:
    made, x, expected = layer(changed(Quantization.tapwise(4), scale="learned"))
    assert all(not q.seen for q in made.quantizers.children())  # pyright: ignore[reportAttributeAccessIssue]
    scales = [parameter for name, parameter in made.named_parameters() if "log2_scale" in name]
    assert len(scales) == 6
    first = relative(made(x), expected)
    optimizer = torch.optim.Adam(scales, 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (made(x) - expected).square().mean().backward()
        assert all(parameter.grad is not None for parameter in scales)
        optimizer.step()
    assert relative(made(x), expected) < 0.9 * first


def test_calibration() -> None:
    """The range of all batches, in evaluation mode; what no batch reaches keeps what it had."""
    made, x, expected = layer(TAPWISE)
    made.eval()
    with pytest.raises(TersenetError, match=r"quantizer of the input has no range yet: train, or run batches inside"):
        made(x)
    model = nn.ModuleDict({"used": made, "unused": copy.deepcopy(made)})
    with torch.no_grad(), calibration(model):
        made(x)
        made(-3 * x)
    observed: Any = made.quantizers["input"]
    assert observed.range.flatten().tolist() == pytest.approx([-3 * float(x.max()), float(x.max())])
    assert relative(made(x), expected) < 0.35
    with torch.no_grad(), calibration(model):
        made(x)
    assert observed.range[0].item() == 0
    with calibration(model):
        pass
    assert relative(made(x), expected) < 0.15
    with pytest.raises(TersenetError, match="no range yet"):
        model["unused"](x)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("flex", FLEX)
def test_state_round_trip(name: str, flex: Flex) -> None:
    """W10: loading gives the same output, also into a copy that has seen nothing, and without asking again."""
    made, x, _ = layer(ALL[name], flex=flex)
    made(x).sum().backward()
    made.eval()
    other, _, _ = layer(ALL[name], seed=1, flex=flex)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(x), made(x))
    with torch.device("meta"):
        empty = WinogradConv2d(16, 12, 3, padding=1, settings=made.settings)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x), made(x))


def test_other_types_start_from_the_fractions() -> None:
    made, x, _ = layer()
    x = x.double()
    half = copy.deepcopy(made).half().double()
    expected = nn.functional.conv2d(x, half.weight, half.bias, padding=1)
    assert relative(half(x), expected) < 1e-10
    y = made.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative(y.double(), expected) < 0.01


def test_training_gives_the_gradients_of_the_convolution() -> None:
    """W3, in the layer, with the loss behind it."""
    made, x, _ = layer()
    conv = nn.functional.conv2d(x, made.weight, made.bias, padding=1)
    leaves = [made.weight, made.bias]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (made(x), conv)), strict=True):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize("name", ["none", "reference", "tapwise", "learned"])
def test_export(name: str) -> None:
    """W14: torch.export of the evaluated layer, any batch size."""
    made, x, _ = layer(ALL[name], flex="full")
    made(x)
    made.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(made, (x,), dynamic_shapes=({0: batch},))
    for inputs in (x, torch.cat((x, -x, x))):
        torch.testing.assert_close(program.module()(inputs), made(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tapwise", "learned"])
def test_compile(name: str) -> None:
    """W14: one graph, in evaluation and in training with observers and backward."""
    torch.compiler.reset()
    made, x, _ = layer(ALL[name], flex="full")
    plain = copy.deepcopy(made)
    made(x), plain(x)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    for model in (compiled, plain):
        model(x).square().sum().backward()
    for one, other in zip(made.parameters(), plain.parameters(), strict=True):
        if one.numel() > 1:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)
    for one, other in zip(made.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    made.eval(), plain.eval()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)


def test_bad_settings() -> None:
    for bits in (1, 40):
        with pytest.raises(ValidationError, match="bits"):
            Quantizer(bits=bits)
    for field, per, message in [
        ("input", "tap", "the input has one scale per tensor, not per tap"),
        ("weight", "tap_channel", "per tensor or channel, not per tap_channel"),
        ("product", "channel", "per tensor or tap or tap_channel, not per channel"),
    ]:
        with pytest.raises(TersenetError, match=message):
            layer(Quantization(**{field: Quantizer(bits=8, per=per)}))
    with pytest.raises(TersenetError, match="needs 5 different points"):
        layer(points=("0", "1"))
    assert WinogradSettings.model_validate({"points": [0, 1, "1/2"]}).points == ("0", "1", "1/2")
    made, x, _ = layer()
    with pytest.raises(TersenetError, match=r"in_channels \(=16\) got an input \(2, 3, 11, 14\)"):
        made(x[:, :3])


def test_what_training_can_break_is_named() -> None:
    made, x, _ = layer(TAPWISE, flex="points")
    made(x)
    made.check("layer1.conv")
    state = made.state_dict()
    with torch.no_grad():
        made.transforms.points[2] = made.transforms.points[1]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(
        TersenetError, match=r"layer1\.conv: the transform \w of F\(4, 3\) is singular .* lower learning"
    ):
        made.check("layer1.conv")
    with torch.no_grad():
        made.transforms.points.fill_(torch.nan)
    with pytest.raises(TersenetError, match="condition number nan"):
        made.check()
    state["quantizers.product.range"] = torch.full((2, 36, 1, 1, 1), torch.nan)
    with pytest.raises(
        TersenetError, match=r"quantizers\.product\.range has NaN or inf: the checkpoint is of a run that"
    ):
        made.load_state_dict(state)
    other, x, _ = layer(TAPWISE)
    other(x * torch.inf)
    with pytest.raises(TersenetError, match="the range of the input"):
        other.check()
