"""How far the outputs of the network as it is are from the original's, on images that no layer is fitted to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tersenet.calibration.images import Images
from tersenet.calibration.resume import Resumed
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import over_kept
from tersenet.graph.trace import tensors_in

_IMAGES = (16, 128)  # on which outputs are compared: few of large networks
_MACS = 30e9


class Outputs:
    """As the network is when this is made, it says what is wanted."""

    def __init__(self, graph: ModelGraph, images: Images, gone: NDArrayBool) -> None:
        self.graph = graph
        count = min(max(_IMAGES[0], int(_MACS / max(1, graph.macs()))), _IMAGES[1])
        self._batches = images.others(count)
        self.restart()
        self._wanted = self._run(gone)

    def restart(self) -> None:
        """Anything may have changed since."""
        batches = self._batches  # not by way of `self`: what is kept would only go with the garbage collector
        self._resumed = Resumed(self.graph, lambda: copy.deepcopy(batches))

    def advance(self, to: int, gone: NDArrayBool) -> None:
        """Nothing before operator `to` changes any more, or until `restart`."""
        self._resumed.advance(to, over_kept(self.graph, gone))

    def error(self, gone: NDArrayBool) -> float:
        """The difference from the original's, as a share of their deviation (root mean square)."""
        now = self._run(gone)
        missed = sum(float((a - b).square().sum()) for a, b in zip(now, self._wanted, strict=True))
        whole = sum(float((b - b.mean(0)).square().sum()) for b in self._wanted)
        return (missed / max(whole, 1e-30)) ** 0.5

    def _run(self, gone: NDArrayBool) -> list[Tensor]:
        actions = over_kept(self.graph, gone)
        # Copies: a network may write into what it is given.
        batches = map(copy.deepcopy, self._batches)
        outputs = [tensors_in(self._resumed.run(n, batch, actions)) for n, batch in enumerate(batches)]
        floating = [[x.detach().double() for x in batch if x.is_floating_point()] for batch in outputs]
        return [torch.cat(parts) for parts in zip(*floating, strict=True)]
