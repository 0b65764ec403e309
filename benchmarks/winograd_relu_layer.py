"""Time and memory of a training step of layers with their weight in the Winograd domain beside nn.Conv2d's.

    python -m benchmarks.winograd_relu_layer

Layers: those of VGG-nagadomi narrowed to 16 channels on 24x24, and 64 to 64 channels on 32x32; N = 128 and 32, forward
and backward, on one thread, in turns; see winograd_layer.py. nn.Conv2d has a ReLU before it. `by torch`: with torch's
operators in place of the generated passes between images and taps.

Writes winograd_relu_layer.json beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.winograd_layer import measured
from torch import Tensor, nn

from tersenet.environment import environment
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings
from tersenet.ops.winograd_relu import winograd_relu_conv2d

RESULT = Path(__file__).with_suffix(".json")
SHAPES = ((128, 16, 16, 24), (128, 16, 32, 12), (128, 32, 32, 12), (128, 64, 64, 6), (32, 64, 64, 32))


class ByTorch(WinogradReLUConv2d):
    def forward(self, x: Tensor) -> Tensor:
        what = (self.geometry, self.activation)
        return winograd_relu_conv2d(x, self.weight, self.mask, self.bias, *self._matrices(x), *what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for n, channels, outputs, side in SHAPES:
        torch.manual_seed(0)
        conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        made: dict[str, nn.Module] = {"nn.Conv2d": nn.Sequential(nn.ReLU(), conv)}
        for tile in (2, 4):
            settings = WinogradReLUSettings(tile=tile)
            made[f"F{tile} Winograd-ReLU"] = WinogradReLUConv2d.from_conv(conv, settings)
            made[f"F{tile} Winograd-ReLU, by torch"] = ByTorch.from_conv(conv, settings)
        x = torch.randn(n, channels, side, side).requires_grad_()
        rows[f"{n} images, {channels} to {outputs} at {side}x{side}"] = measured(made, x, options.rounds)
    result = {
        "claim": "training step of layers with weight and ReLU in the Winograd domain beside ReLU and nn.Conv2d",
        "rounds": options.rounds,
        "rows": rows,
        "environment": environment("cpu"),
        "command": "python -m benchmarks.winograd_relu_layer",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: {m: round(r["time_ratio"], 2) for m, r in v.items()} for k, v in rows.items()}, indent=1))


if __name__ == "__main__":
    main()
