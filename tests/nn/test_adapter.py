from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.nn.adapter import ChannelAdapter

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def brute_force(conv: Any, constants: Tensor, size: tuple[int, ...]) -> Tensor:
    """What the layer makes of an image that holds one constant per channel."""
    image = constants.view(1, -1, *[1] * len(size)).expand(1, -1, *size)
    with torch.no_grad():
        return conv(image)[0]


def check(conv: Any, size: tuple[int, ...]) -> None:
    conv = conv.double()
    constants = torch.randn(conv.in_channels, dtype=torch.float64)
    adapter = ChannelAdapter(conv, taps=True).double()
    groups = conv.groups
    seen = constants.view(groups, -1).repeat_interleave(conv.out_channels // groups, 0)
    adapter.taps = (conv.weight.detach() * seen.view(*seen.shape, *[1] * len(size))).sum(1)
    expected = brute_force(conv, constants, size)
    found = adapter.border_map(torch.Size(size), expected.shape[1:])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    adapter.eval()
    with torch.no_grad():
        zeros = torch.zeros(2, conv.in_channels, *size, dtype=torch.float64)
        torch.testing.assert_close(adapter(zeros), expected.expand(2, *expected.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("padding", [0, 1, 3, "same", "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_border_map_is_what_the_convolution_does(kernel: int, padding: int | str, dims: int) -> None:
    torch.manual_seed(kernel)
    sizes = (9, 12, 8)[:dims]
    for stride in (1, 2, 3):
        for dilation in (1, 2):
            if (padding == "same" and stride > 1) or (padding == 3 and kernel == 1):
                continue
            reach = dilation * (kernel - 1) + 1
            amount = padding if isinstance(padding, int) else 0
            size = tuple(max(s, reach - 2 * amount) for s in sizes)
            conv = CONVOLUTIONS[dims - 1](3, 4, kernel, stride, padding, dilation, bias=False)
            check(conv, size)


def test_border_map_of_unequal_axes_even_kernels_and_groups() -> None:
    torch.manual_seed(0)
    check(nn.Conv2d(4, 6, (2, 5), (2, 1), (1, 2), (1, 3), groups=2, bias=False), (7, 15))
    check(nn.Conv2d(3, 4, (4, 2), padding="same", bias=False), (5, 6))
    check(nn.Conv2d(3, 4, 4, padding="same", dilation=3, bias=False), (11, 13))
    check(nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1), bias=False), (3, 4, 5))


def test_images_of_other_sizes_get_maps_of_their_own() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    adapter = ChannelAdapter(conv, taps=True).eval()
    adapter.taps = torch.randn(4, 3, 3)
    for size in (5, 8, 5):
        with torch.no_grad():
            out = adapter(torch.zeros(1, 3, size, size))
        torch.testing.assert_close(out[0, :, 2, 2], adapter.taps.sum((1, 2)))
        torch.testing.assert_close(out[0, :, 0, 0], adapter.taps[:, 1:, 1:].sum((1, 2)))
    adapter.taps.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(adapter(torch.zeros(1, 3, 8, 8))[0, :, 2, 2], adapter.taps.sum((1, 2)))


def middle(adapter: ChannelAdapter, size: int = 5) -> Tensor:
    return adapter(torch.zeros(1, 3, size, size))[0, :, 2, 2].clone()


def test_the_map_follows_the_taps() -> None:
    adapter = ChannelAdapter(nn.Conv2d(3, 4, 3, padding=1, bias=False), taps=True).eval()
    assert adapter.taps is not None
    other = copy.deepcopy(adapter)
    other.get_buffer("taps").fill_(3.0)
    with torch.no_grad():
        assert torch.equal(middle(adapter), torch.zeros(4))
        adapter.taps.fill_(1.0)
        assert torch.equal(middle(adapter), torch.full((4,), 9.0))
        copied = copy.deepcopy(adapter)
        copied.get_buffer("taps").fill_(2.0)
        assert torch.equal(middle(copied), torch.full((4,), 18.0))
        adapter.load_state_dict(other.state_dict())
        assert torch.equal(middle(adapter), torch.full((4,), 27.0))
        adapter.taps = torch.full((4, 3, 3), 5.0)
        assert torch.equal(middle(adapter), torch.full((4,), 45.0))
        assert middle(adapter.double().float()).dtype == torch.float32
        assert adapter.double()(torch.zeros(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_a_network_made_in_inference_mode_works() -> None:
    """Its tensors have no version that tells of changes."""
    taps = torch.randn(4, 3, 3)
    with torch.inference_mode():
        adapter = ChannelAdapter(nn.Conv2d(3, 4, 3, padding=1, bias=False), taps=True).eval()
        assert torch.equal(middle(adapter), torch.zeros(4))
        adapter.load_state_dict({**adapter.state_dict(), "taps": taps})
        torch.testing.assert_close(middle(adapter), taps.sum((1, 2)))
        torch.testing.assert_close(middle(adapter, 8), taps.sum((1, 2)))
    with torch.no_grad():
        torch.testing.assert_close(middle(adapter), taps.sum((1, 2)))


def test_a_map_made_in_inference_mode_serves_training() -> None:
    adapter = ChannelAdapter(nn.Conv2d(3, 4, 3, padding=1, bias=False), taps=True)
    x = torch.zeros(1, 3, 5, 5)
    with torch.inference_mode():
        adapter(x)
    adapter(x).square().sum().backward()
    assert adapter.inner.weight.grad is not None


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_gather_and_scatter(layer: str) -> None:
    torch.manual_seed(0)
    if layer == "conv":
        inner: nn.Module = nn.Conv2d(2, 3, 1)
        x, axis = torch.randn(2, 5, 4, 4), 1
    else:
        inner = nn.Linear(2, 3)
        x, axis = torch.randn(2, 7, 5), 2
    adapter = ChannelAdapter(inner, gather=(1, 4), scatter=(0, 2, 3), width=6)
    assert adapter.constant is not None
    adapter.constant.copy_(torch.arange(6.0))
    y = adapter(x).movedim(axis, 0)
    expected = inner(x.index_select(axis, torch.tensor([1, 4]))).movedim(axis, 0)
    assert torch.equal(y[[0, 2, 3]], expected)
    for channel in (1, 4, 5):
        assert (y[channel] == channel).all()


def test_what_the_layer_has_is_found_on_the_adapter() -> None:
    conv = nn.Conv2d(2, 3, 5, stride=2)
    adapter = ChannelAdapter(conv, gather=(0, 1))
    assert adapter.weight is conv.weight
    assert (adapter.kernel_size, adapter.stride, adapter.out_channels) == ((5, 5), (2, 2), 3)
    with pytest.raises(AttributeError, match="nothing"):
        _ = adapter.nothing
    copied = copy.deepcopy(adapter)
    assert copied.weight is copied.inner.weight
    assert copied.weight is not conv.weight
    assert set(adapter.state_dict()) == {"inner.weight", "inner.bias"}


@pytest.mark.parametrize(
    ("inner", "arguments", "message"),
    [
        (nn.BatchNorm2d(4), {"taps": True}, "taps belong to a convolution or linear layer, not BatchNorm2d"),
        (nn.Conv2d(2, 3, 1), {"scatter": (0, 1, 2)}, "scatter needs a width"),
        (nn.Conv2d(2, 3, 1), {"scatter": (0, 1, 6), "width": 6}, "above its last index"),
        (nn.Conv2d(2, 3, 1), {"width": 6}, "scatter needs a width"),
    ],
)
def test_what_does_not_fit_is_refused(inner: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        ChannelAdapter(inner, **arguments)
