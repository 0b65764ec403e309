"""Native Winograd layers with small activations cut off: `sparse_winograd` with `threshold`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sparse_support import PAIRS, applied, data, images, net, trained
from torch import Tensor
from torch.nn import functional as F

import tersenet as tn
from tersenet.exporting import artifact
from tersenet.measuring.workload import workload
from tersenet.methods.sparse_winograd import SparseWinograd
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings

FIT: dict[str, Any] = {"epochs": 1, "lr": 0.01}


def layer(threshold: float, channels: int = 3, dtype: torch.dtype = torch.float64) -> WinogradReLUConv2d:
    torch.manual_seed(0)
    settings = WinogradReLUSettings(relu=False, threshold=threshold)
    return WinogradReLUConv2d(channels, 5, bias=True, settings=settings, dtype=dtype)


def by_definition(own: WinogradReLUConv2d, x: Tensor, threshold: float) -> Tensor:
    """Tile by tile, for even maps."""
    at, _, bt = own.transforms(x.dtype)
    tiles = F.pad(x, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
    v = bt @ tiles @ bt.t()
    v = torch.where(v.abs() > threshold, v, 0.0)
    w = own.weight.view(4, 4, own.in_channels, own.out_channels)
    y = at @ torch.einsum("nchwij,ijck->nkhwij", v, w) @ at.t()
    assert own.bias is not None
    return y.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3) + own.bias.view(-1, 1, 1)


# Large enough, the second one is run by generated code.
@pytest.mark.parametrize(("channels", "side", "dtype"), [(3, 6, torch.float64), (16, 24, torch.float32)])
def test_outputs_and_gradients_are_those_of_the_definition(channels: int, side: int, dtype: torch.dtype) -> None:
    own = layer(0.7, channels, dtype)
    x = torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    given, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    made, expected = own(given), by_definition(own, wanted, 0.7)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made, by_definition(own, x, 0.0), rtol=1e-2, atol=1e-2)
    upstream = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = torch.autograd.grad(made, [given, own.weight], upstream)
    # That of the input goes past the threshold.
    (past,) = torch.autograd.grad(by_definition(own, wanted, 0.0), wanted, upstream)
    (weight,) = torch.autograd.grad(expected, own.weight, upstream)
    torch.testing.assert_close(found[0], past, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], weight, rtol=1e-3, atol=1e-3)


def test_workload_counts_the_zeros_that_it_makes() -> None:
    plain, cut = net(), net()
    applied(plain, mode="native")
    applied(cut, mode="native", threshold=0.5)
    before = {row.name: row for row in workload(plain, data().test.batches(0), 8).rows}  # pyright: ignore[reportOptionalMemberAccess]
    after = {row.name: row for row in workload(cut, data().test.batches(0), 8).rows}  # pyright: ignore[reportOptionalMemberAccess]
    first = after["pooled"]
    assert first.activation_density < 0.8 * before["pooled"].activation_density
    assert first.exact < 0.8 * before["pooled"].exact
    assert first.native == before["pooled"].native
    own = cut.get_submodule("pooled")
    assert isinstance(own, WinogradReLUConv2d)
    seen: list[Tensor] = []
    handle = own.register_forward_pre_hook(lambda module, given: seen.append(own.transformed(given[0])))
    batches = [x for x, _ in data().test.batches(0)][:2]  # pyright: ignore[reportOptionalMemberAccess]
    for x in batches:
        cut(x)
    handle.remove()
    assert first.activation_density == pytest.approx(float(torch.cat(seen, 1).ne(0).float().mean()), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"mode": "spatial"}])
def test_a_threshold_without_native_layers_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="`threshold` is for native layers"):
        SparseWinograd(fit=FIT, threshold=0.5, **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("threshold", [-0.1, float("inf"), float("nan")])
def test_a_threshold_is_a_finite_number_from_zero_on(threshold: float) -> None:
    with pytest.raises(ValidationError, match="threshold"):
        SparseWinograd(fit=FIT, mode="native", threshold=threshold)  # pyright: ignore[reportArgumentType]


def test_with_moved_relus_only_the_other_layers_have_it() -> None:
    model = net()
    applied(model, others="native", threshold=0.5)
    found = {n: m.activation.threshold for n, m in model.named_modules() if isinstance(m, WinogradReLUConv2d)}
    assert found == dict.fromkeys(PAIRS, 0.0) | {"trunk": 0.5}


def test_it_is_saved_pruned_and_lowered(tmp_path: Path) -> None:
    model = net()
    trained(model, mode="native", threshold=0.5, spatial_gradient=True, density=0.5)
    trained(model, mode="native", density=0.25)
    expected = model.eval()(images(3))
    artifact.save(model, tmp_path / "made")
    loaded = artifact.load(tmp_path / "made", base=net(5))
    own = loaded.get_submodule("pooled")
    assert isinstance(own, WinogradReLUConv2d)
    assert (own.activation.threshold, own.density) == (0.5, pytest.approx(0.25, abs=0.01))
    assert torch.equal(loaded.eval()(images(3)), expected)
    lowered = tn.lower(loaded, images(3), choice="F2")
    torch.testing.assert_close(lowered(images(3)), expected, rtol=1e-4, atol=1e-4)
    assert "F2" in {layer.choice for layer in lowered.report.layers if "cut 0.5" in layer.kind}
