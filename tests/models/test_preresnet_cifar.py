from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.preresnet_cifar import preresnet_cifar


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The paper's figure 4e, evaluated from the tensors alone."""

    def activation(x: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"]))

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        blocks = sum(f"layer{stage}.{i}.conv1.weight" in state for i in range(100))
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = activation(x, f"{name}.bn1")
            if i == 0:
                # Every stage's first block splits behind the activation: the first one too, behind the stem.
                projection = state.get(f"{name}.downsample.0.weight")
                x = y if projection is None else F.conv2d(y, projection, stride=stride)
            for k in (1, 2, 3):
                weight = state.get(f"{name}.conv{k}.weight")
                if weight is not None:
                    y = y if k == 1 else activation(y, f"{name}.bn{k}")
                    y = F.conv2d(y, weight, stride=stride if k == 1 else 1, padding=weight.shape[2] // 2)
            x = x + y
    return F.linear(activation(x, "bn").mean((2, 3)), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize(("depth", "bottleneck"), [(8, False), (20, False), (20, True)])
def test_outputs_equal_those_of_the_plain_formula(depth: int, bottleneck: bool) -> None:
    torch.manual_seed(0)
    model = preresnet_cifar(depth, bottleneck, width=6).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference(model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# 1.7 million for both is the paper's table 2.
@pytest.mark.parametrize(
    ("depth", "bottleneck", "params"), [(20, False, 272_282), (110, False, 1_730_522), (164, True, 1_703_258)]
)
def test_parameter_counts(depth: int, bottleneck: bool, params: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in preresnet_cifar(depth, bottleneck).parameters()) == params


def test_depth_counts_the_layers_on_the_longest_path() -> None:
    for depth, bottleneck in ((56, False), (164, True)):
        with torch.device("meta"):
            model = preresnet_cifar(depth, bottleneck)
        layers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
        ]
        assert len(layers) == depth


@pytest.mark.parametrize(("depth", "bottleneck"), [(2, False), (21, False), (32, True), (2, True)])
def test_other_depths_are_refused(depth: int, bottleneck: bool) -> None:
    with pytest.raises(TersenetError, match=f"depth={depth}, bottleneck={bottleneck}.*depth must be"):
        preresnet_cifar(depth, bottleneck)
