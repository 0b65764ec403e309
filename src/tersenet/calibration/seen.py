"""Sampled rows of what layers read and put out in one batch, and of what is added to it.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 4.1 (sampling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor

from tersenet.calibration.images import Images
from tersenet.calibration.readers import Reader
from tersenet.calibration.resume import Reached, Resumed
from tersenet.data.bundle import first_tensor
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import Action
from tersenet.ops.rows import conv_rows, draw_positions, output_rows


class Places:
    """Positions for each use of a layer, drawn when they are first asked for: the same for both networks."""

    def __init__(
        self, images: Images, number: int, batch: tuple[Any, ...], names: Mapping[int, int] | None = None
    ) -> None:
        """`names`: use -> the use of the other network whose positions these are."""
        self.images, self.batch, self.count = images, number, len(first_tensor(batch))
        self._names = names or {}
        self._drawn: dict[int, Tensor] = {}

    def of(self, use: int, count: int, places: int, per_image: int) -> Tensor:
        use = self._names.get(use, use)
        if use not in self._drawn:
            seed = hash((self.images.seed, self.batch, use)) % (1 << 62)
            self._drawn[use] = draw_positions(count, places, per_image, torch.Generator().manual_seed(seed))
        return self._drawn[use]


class Seen:
    """Rows of inputs, outputs and other operands of sums, by the use that they belong to."""

    def __init__(
        self,
        graph: ModelGraph,
        readers: Sequence[Reader],
        places: Places,
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self.graph, self.places = graph, places
        self.keeps_outputs, self.keeps_inputs = outputs, inputs
        self.last = max(reader.last for reader in readers)
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.others: dict[int, Tensor] = {}
        self.actions: dict[int, Action] = {}
        for reader in readers:
            for use in reader.uses:
                self.actions[use] = self._layer(reader, use)
            if reader.sum is not None:
                self.actions[reader.sum[0]] = self._sum(reader, self.actions.get(reader.sum[0]))

    def run(self, resumed: Resumed, number: int, batch: tuple[Any, ...], others: Mapping[int, Action]) -> None:
        """As far as it has to; `others` are what else is done in place of operators."""
        before = self.actions[self.last]

        def stop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before(func, args, kwargs)
            raise Reached

        with suppress(Reached):
            resumed.run(number, batch, {**others, **self.actions, self.last: stop})

    def _layer(self, reader: Reader, use: int) -> Action:
        argument = self.graph.ends[reader.end].reads_argument
        # A linear layer adds its bias behind the product where it reads a view: it belongs to what is wanted.
        apart = getattr(self.graph.model.get_submodule(reader.layer), "bias", None)
        apart = apart if self.graph.trace.ops[use].name == "mm" else None

        def look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # The last layer's result is not used where the outputs are known: its shape will do.
            idle = use == self.last and not self.keeps_outputs
            result: Tensor = _on_meta(func, args, kwargs) if idle else func(*args, **kwargs)
            x: Tensor = args[argument].detach()
            if result.dim() == 2:
                most = self.places.images.positions * self.places.count
                rows = self.places.of(use, 1, len(x), most)[0].to(x.device)
                x = x[rows]
                if self.keeps_outputs:
                    y = result.detach()[rows]
                    self.outputs[use] = y if apart is None else y + apart.detach()
            else:
                at = self.places.of(use, len(x), prod(result.shape[2:]), self.places.images.positions)
                if self.keeps_outputs:
                    self.outputs[use] = output_rows(result.detach().flatten(2)[:, :, None], at)
                if self.keeps_inputs:
                    x = _conv_inputs(x, args, at)
            if self.keeps_inputs:
                self.inputs[use] = x
            return result

        return look

    def _sum(self, reader: Reader, inner: Action | None) -> Action:
        assert reader.sum is not None
        place, use = reader.sum[1], reader.uses[0]

        def look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            other = args[place].detach().flatten(2)[:, :, None]
            self.others[use] = output_rows(other, self.places.of(use, 0, 0, 0))
            return func(*args, **kwargs) if inner is None else inner(func, args, kwargs)

        return look


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)


def _conv_inputs(x: Tensor, args: tuple[Any, ...], at: Tensor) -> Tensor:
    """Rows of what a convolution's operator reads; of a 1d one, as of an image that is one value high."""
    kernel = tuple(args[1].shape[2:])
    flat = len(kernel) == 1
    if flat:
        x = x[:, :, None]

    def pair(index: int, missing: int) -> tuple[int, int]:
        values = tuple(args[index])
        return (missing, values[0]) if flat else (values[0], values[-1])

    size = (1, kernel[0]) if flat else (kernel[0], kernel[1])
    return conv_rows(x, size, at, stride=pair(3, 1), padding=pair(4, 0), dilation=pair(5, 1))
