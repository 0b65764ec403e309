"""The state of one quantizer: its range, and its scale where that is learned."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.winograd_settings import Quantizer
from tersenet.ops.fake_quantize import Rounding, empty_range, fake_quantize, learned_scale, scale_of
from tersenet.ops.winograd import Stage

_direct = False


def is_direct() -> bool:
    """Whether this is inside `directly`."""
    return _direct


@contextmanager
def directly() -> Generator[None]:
    """Inside, Winograd and quantized layers are plain convolutions: for tracing, and for counting multiply-adds as for
    any other network. No range is needed or observed."""
    global _direct
    before, _direct = _direct, True
    try:
        yield
    finally:
        _direct = before


class FakeQuantizer(nn.Module):
    """What a tensor is rounded with: a range that follows it in training, and nothing else ever changes it.

    Whether it has seen anything is known in Python too, and is found in the state that is loaded: the device is never
    asked in forward.

    Differs: the reference's, asked before it has seen anything, rounds to whole numbers; this one refuses. The
    reference's follow the test data with --warmup; these only observe in training and inside `calibration`.
    """

    range: Tensor
    log2_scale: Tensor | None

    def __init__(self, settings: Quantizer, shape: tuple[int, ...], name: str) -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        learned = settings.scale == "learned"
        self.rounding = Rounding(settings.bits, shape, settings.power_of_two, settings.clip_gradient, learned)
        self.calibrating = False
        self.seen = False
        self.register_buffer("range", empty_range(shape))
        self.register_parameter("log2_scale", nn.Parameter(torch.zeros(shape)) if learned else None)

    def stage(self) -> tuple[Stage, Tensor]:
        """What happens to the tensor in this pass, and the state that it needs: the range, or the scale."""
        if self.calibrating:
            return Stage(self._plain, "joined"), self.range
        if self.training and (self.log2_scale is None or not self.seen):
            return Stage(self._plain, "moving", self.settings.momentum), self.range
        if not self.seen:
            raise TersenetError(
                f"the quantizer of the {self.name} has no range yet: train, or run batches inside "
                "`tersenet.nn.winograd.calibration(model)`, before evaluating"
            )
        if self.log2_scale is not None:
            return Stage(self.rounding), learned_scale(self.log2_scale, self.rounding)
        return Stage(self.rounding), scale_of(self.range, self.rounding)

    @property
    def _plain(self) -> Rounding:
        """While a range is observed, nothing is learned from the scale."""
        r = self.rounding
        return Rounding(r.bits, r.shape, r.power_of_two, r.clip_gradient or r.learned)

    @torch.no_grad()
    def observed(self, values: Tensor) -> None:
        """Take over the new range; a learned scale starts from it."""
        self.range.copy_(values)
        if self.log2_scale is not None:
            exact = Rounding(self.rounding.bits, self.rounding.shape)
            self.log2_scale.copy_(scale_of(self.range, exact).log2())
        self.seen = True

    def forward(self, values: Tensor) -> Tensor:
        stage, state = self.stage()
        # In 16 bits a small scale would be zero, and a level above 65504 infinite.
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        with torch.no_grad():
            scale, found = stage.settle(wide.detach(), state)
        if found is not None:
            self.observed(found)
        scale = state.to(wide.dtype) if stage.observing == "no" else scale
        return fake_quantize(wide, scale, stage.rounding).to(values.dtype)

    def check(self) -> None:
        """Raises: TersenetError for a range or scale that is not finite."""
        if self.seen and not torch.isfinite(self.range).all():
            raise TersenetError(
                f"the range of the {self.name} is {self.range.flatten().tolist()[:4]}; it must be finite: look for NaN "
                "or inf in the images and the weights, or train with a lower learning rate"
            )
        if self.log2_scale is not None and not torch.isfinite(self.log2_scale).all():
            raise TersenetError(f"the learned scale of the {self.name} is not finite; use a lower learning rate for it")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """torch takes a range of five axes for a video, and fails to put it in channels_last order."""

        def flat(t: Tensor) -> Tensor:
            return fn(t.flatten()).view(t.shape) if t.dim() == 5 else fn(t)

        return super()._apply(flat, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        values = state_dict.get(prefix + "range")
        if isinstance(values, Tensor) and values.device.type != "meta":
            seen = bool((values[0] <= values[1]).all())
            if torch.isnan(values).any() or (seen and torch.isinf(values).any()):
                raise TersenetError(
                    f"{prefix}range has NaN or inf: the checkpoint is of a run that diverged; use an earlier one"
                )
            self.seen = seen
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
