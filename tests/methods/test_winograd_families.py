"""Networks of other libraries are swapped, adapted and exported by a recipe alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersenet as tn
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from zoo_support import needs

pytestmark = [pytest.mark.slow, needs("timm", "torchvision")]
# Winograd layers of each: five families have some; those of depthwise convolutions have none, and are quantized.
FAMILIES = {
    "timm:resnet18": 10,
    "timm:densenet121": 30,
    "torchvision:shufflenet_v2_x0_5": 0,
    "torchvision:vgg11_bn": 6,
    "timm:regnetx_002": 9,
    "torchvision:squeezenet1_1": 8,
    "timm:mobilenetv2_050": 0,
}
SIDE = 64


class Images:
    """Two batches of four."""

    n = 8

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            yield torch.randn(4, 3, SIDE, SIDE, generator=generator), torch.arange(4)


def steps(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_adapted_without_user_code(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tile": 4, "calibration_batches": 1, "fit": {"epochs": 1, "lr": 1e-4}}
    recipe = {"name": "adapt", "description": "", "steps": [{"method": "winograd_aware", **settings}]}
    loaders = {"train": Images(), "test": Images(), "shape": (3, SIDE, SIDE), "classes": 10}
    done = tn.compress(name, recipe, data=loaders, out=tmp_path / "run")
    layers = [m for m in done.model.modules() if isinstance(m, WinogradConv2d)]
    assert len(layers) >= FAMILIES[name]
    # 1x1 ones and those with a stride.
    assert any(isinstance(m, QuantizedConv2d) for m in done.model.modules()) or name == "torchvision:vgg11_bn"
    x = torch.randn(2, 3, SIDE, SIDE)
    expected = steps(done.model, x)
    assert expected.isfinite().all()
    # By its name and the file alone.
    assert torch.equal(steps(tn.load(tmp_path / "run" / "model"), x), expected)
