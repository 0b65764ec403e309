"""What channel pruning leaves of a trained CIFAR ResNet without any training after it, beside its baselines.

    python -m benchmarks.channel_pruning_cifar10 --model resnet56 --weights resnet56-4bfd9763.th --data cifar10:DIR

For 50 % of the MACs: the whole method, the same with parts of it taken away, `magnitude`, and Torch-Pruning's magnitude
pruner; top-1 on the 10,000 test images, before any fine-tuning. Magnitude, Torch-Pruning and what is not reconstructed
get batch norm statistics estimated anew on 1024 training images (8 batches); a reconstruction needs none. Writes
channel_pruning_MODEL_cifar10.json beside this file after each row, and leaves out rows that are in it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from benchmarks.cifar_resnet import CPU, applied, described, figures, measured_rows, opened, parser_of
from torch import nn

from tersenet.data.bundle import Data
from tersenet.measuring.macs import count_macs
from tersenet.methods.base import Method
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.magnitude import Magnitude
from tersenet.models.open import example_of
from tersenet.recipe_target import Target
from tersenet.train.recalibrate import recalibrate_bn

BATCHES = 8
PEER = "Torch-Pruning, magnitude l2, global"
BARE = "even rates: LASSO, no reconstruction"


def even(**settings: Any) -> Method:
    return ChannelPruning.model_validate({"residual": "independent", "allocate": "uniform"} | settings)


ROWS: dict[str, Method | None] = {
    "measured rates: LASSO, reconstruction": ChannelPruning(residual="independent"),
    "even rates: LASSO, reconstruction": even(),
    "even rates: max response, reconstruction": even(select="max_response"),
    "even rates: first k, reconstruction": even(select="first"),
    "even rates: random, reconstruction": even(select="random"),
    BARE: even(reconstruct=False),
    "measured rates, trunk pruned: LASSO, reconstruction": ChannelPruning(),
    "magnitude l1, even rates": Magnitude(score="l1", recalibrate_bn=BATCHES),
    "magnitude l2, global": Magnitude(score="l2", scope="global", recalibrate_bn=BATCHES),
    PEER: None,
}


def peer(model: nn.Module, data: Data, target: Target) -> tuple[nn.Module, float]:
    """Torch-Pruning steps until the target is met; the channels inside all blocks compete.

    It breaks a trunk whose shortcuts pad with zeros (the classifier gets 63 channels for its 60): that stays whole.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    example, steps, trunk = example_of(model), 200, ("conv1", "linear")
    whole = left = count_macs(model, example)[0]
    pruner = tp.pruner.BasePruner(
        model,
        example[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.9,
        max_pruning_ratio=0.9,
        iterative_steps=steps,
        ignored_layers=[m for name, m in model.named_modules() if name in trunk or name.endswith("conv2")],
    )
    for _ in range(steps):
        pruner.step()
        left = count_macs(model, example)[0]
        if left <= target.limit(whole):
            break
    assert data.train is not None
    recalibrate_bn(model, data.train, BATCHES, device=CPU)
    return model, left / whole


def pruned(name: str, model: nn.Module, data: Data, target: Target) -> tuple[nn.Module, float]:
    method = ROWS[name]
    if method is None:
        return peer(model, data, target)
    found = applied(method, model, data, target)
    if name == BARE:
        assert data.train is not None
        recalibrate_bn(found[0], data.train, BATCHES, device=CPU)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--target", nargs="*", default=["macs=50%"])
    options = parser.parse_args()
    model, data = opened(options.model, options)
    path = Path(__file__).with_name(f"channel_pruning_{options.model}_cifar10.json")
    claim = f"accuracy of {options.model} on CIFAR-10 right after pruning, no training"
    result = described(claim, __file__, options, f" --model {options.model}") | {"start": figures(model, data)}
    cases = [{"target": target, "method": name} for target in options.target for name in options.only]

    def made(case: dict[str, str]) -> tuple[nn.Module, float]:
        return pruned(case["method"], model, data, Target.parse(case["target"]))

    measured_rows(result, path, cases, made, data, widths)


def widths(model: nn.Module) -> dict[str, Any]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return {"widths": {name: [layer.in_channels, layer.out_channels] for name, layer in layers.items()}}


if __name__ == "__main__":
    main()
