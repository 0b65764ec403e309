from __future__ import annotations

import pytest
import torch

from tersenet.errors import TersenetError
from tersenet.nn.channel_pad import ZeroPadShortcut


def test_subsamples_and_places_the_channels() -> None:
    x = torch.randn(2, 3, 5, 6)
    y = ZeroPadShortcut(1, 2, 2)(x)
    assert y.shape == (2, 6, 3, 3)
    assert torch.equal(y[:, 1:4], x[:, :, ::2, ::2])
    assert not y[:, :1].any()
    assert not y[:, 4:].any()


def test_nothing_to_do_is_the_identity() -> None:
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(ZeroPadShortcut(0, 0, 1)(x), x)


def test_attributes_may_be_changed() -> None:
    module = ZeroPadShortcut(8, 8, 2)
    module.before, module.after = 3, 0
    assert module(torch.randn(1, 5, 4, 4)).shape == (1, 8, 2, 2)
    assert repr(module) == "ZeroPadShortcut(before=3, after=0, stride=2)"
    assert not module.state_dict()


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_refuses_cropping_and_no_stride(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(TersenetError, match="at least"):
        ZeroPadShortcut(*arguments)
