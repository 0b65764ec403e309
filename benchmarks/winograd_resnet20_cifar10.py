"""A trained ResNet-20 with its convolutions swapped for Winograd ones, calibrated and not trained.

    python -m benchmarks.winograd_resnet20_cifar10 --data cifar10:DIR --weights resnet20-12fca82f.th

For direct convolutions, F2 and F4, at 8 bits, with the paper's quantizers (one scale per tensor) and with one scale per
tap: ranges from 8 training batches of 128, then the 10,000 test images. The first layer and those with a stride are as
the method leaves them by default. Writes winograd_resnet20_cifar10.json beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cifar_resnet import applied, described, figures, opened, parser_of

from tersenet.methods.winograd_aware import WinogradSwap

RESULT = Path(__file__).with_suffix(".json")
# Killed, it goes on behind the last row that was finished.
PARTIAL = RESULT.with_suffix(".partial.json")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"tile": 4, "bits": None},
    {"tile": "direct"},
    {"tile": 2, "quantizers": "reference"},
    {"tile": 2, "quantizers": "tapwise"},
    {"tile": 4, "quantizers": "reference"},
    {"tile": 4, "quantizers": "tapwise"},
    {"tile": 4, "quantizers": "tapwise", "product_bits": 10},
)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    model, data = opened("resnet20", options)
    rows: list[dict[str, Any]] = json.loads(PARTIAL.read_text()) if PARTIAL.is_file() else []
    done = [row["settings"] for row in rows]
    for settings in SETTINGS:
        if settings not in done:
            swapped, _ = applied(WinogradSwap.model_validate(settings), model, data)
            rows.append({"settings": settings, **figures(swapped, data)})
            print(rows[-1], flush=True)
            PARTIAL.write_text(json.dumps(rows))
    claim = "accuracy of ResNet-20 on CIFAR-10 right after the swap and calibration, no training"
    result = described(claim, __file__, options) | {"start": figures(model, data), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PARTIAL.unlink()


if __name__ == "__main__":
    main()
