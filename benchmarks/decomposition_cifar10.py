"""What the two decompositions and 3C leave of a trained CIFAR ResNet before any training, beside channel pruning.

    python -m benchmarks.decomposition_cifar10 --model resnet56 --weights resnet56-4bfd9763.th --data cifar10:DIR

For 50 % and 70 % of the MACs, top-1 on the 10,000 test images. Calibration takes 500 training images. 3C goes half of
the way by spatial decomposition, a quarter by channel decomposition and the rest by channel pruning. Writes
decomposition_MODEL_cifar10.json beside this file after each row, and leaves out rows that are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cifar_resnet import applied, described, figures, measured_rows, opened, parser_of
from torch import nn

from tersenet.data.bundle import Data
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Method
from tersenet.methods.channel_decomposition import ChannelDecomposition
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.spatial_decomposition import SpatialDecomposition
from tersenet.models.open import example_of
from tersenet.recipe_target import Target

SHARES = (0.5, 0.7)
IMAGES = 500
# Method and the share of what has to go that is gone after it.
Steps = Sequence[tuple[Method, float]]
ROWS: dict[str, Steps] = {
    "spatial": [(SpatialDecomposition(images=IMAGES), 1.0)],
    "spatial, even rates": [(SpatialDecomposition(images=IMAGES, allocate="uniform"), 1.0)],
    "spatial, even rates, linear fit": [(SpatialDecomposition(images=IMAGES, allocate="uniform", relu=False), 1.0)],
    "spatial, energy": [(SpatialDecomposition(images=IMAGES, allocate="energy"), 1.0)],
    "channel": [(ChannelDecomposition(images=IMAGES), 1.0)],
    "channel, even rates": [(ChannelDecomposition(images=IMAGES, allocate="uniform"), 1.0)],
    "channel, even rates, linear fit": [(ChannelDecomposition(images=IMAGES, allocate="uniform", relu=False), 1.0)],
    "3C": [
        (SpatialDecomposition(images=IMAGES), 0.5),
        (ChannelDecomposition(images=IMAGES), 0.75),
        (ChannelPruning(images=IMAGES), 1.0),
    ],
    "spatial, then pruning": [(SpatialDecomposition(images=IMAGES), 0.8), (ChannelPruning(images=IMAGES), 1.0)],
    "channel pruning": [(ChannelPruning(images=IMAGES), 1.0)],
}


def chained(steps: Steps, share: float, model: nn.Module, data: Data) -> tuple[nn.Module, float]:
    """A copy of the network with all steps applied, and the share of the multiply-adds that is left."""
    whole = ModelGraph(model, example_of(model, batch=2)).macs()
    for method, way in steps:
        wanted = Target("macs", float(int(whole * (1 - way * (1 - share)))), relative=False)
        model, _ = applied(method, model, data, wanted)
    return model, ModelGraph(model, example_of(model, batch=2)).macs() / whole


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--share", nargs="*", type=float, default=list(SHARES))
    options = parser.parse_args()
    model, data = opened(options.model, options)
    path = Path(__file__).with_name(f"decomposition_{options.model}_cifar10.json")
    claim = f"accuracy of {options.model} on CIFAR-10 right after low-rank decomposition, no training"
    result = described(claim, __file__, options, f" --model {options.model}") | {"start": figures(model, data)}
    cases = [{"share": share, "method": name} for share in options.share for name in options.only]
    measured_rows(result, path, cases, lambda case: chained(ROWS[case["method"]], case["share"], model, data), data)


if __name__ == "__main__":
    main()
