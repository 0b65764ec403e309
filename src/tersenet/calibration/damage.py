"""What a layer costs the network's outputs at every number of units or ranks left, from trials at a few of them.

The response error is known at every number. A trial says how much damage to the outputs one unit of that error does
there; between trials this factor is interpolated. It may rise steeply where little is left, since what a layer's
responses have most of need not be what the outputs need. So the fewest that can be left are tried too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from tersenet.train import distributed

_TRIED = (0.0, 0.125, 0.25, 0.5, 0.75)  # shares left; 0 stands for 1 unit
_WORST = 1e12  # all of the outputs' variance many times over: outputs that are not finite count as this


def damage_curve(errors: NDArray[np.float64], damage_at: Callable[[int], float]) -> NDArray[np.float64]:
    """(size + 1,) response errors with 0, 1, ... size left -> damage, never rising with what is left.

    `damage_at` tries one number, which may leave a network without finite outputs: that is the worst there is, and does
    not end a calibration. Every process gets the curve of the first one.
    """
    size = len(errors) - 1
    counts = sorted({max(1, round(share * size)) for share in _TRIED} - {size})
    if not counts:
        return errors
    found = {count: damage_at(count) for count in counts}
    factors = [(value if value < _WORST else _WORST) / max(errors[count], 1e-9) for count, value in found.items()]
    damage = torch.from_numpy(errors * np.interp(np.arange(size + 1), counts, factors))
    distributed.broadcast([damage])
    return np.maximum.accumulate(damage.numpy()[::-1])[::-1].copy()
