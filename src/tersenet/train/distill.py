"""What training minimises: the task's loss, and the distance to a teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersenet.errors import TersenetError
from tersenet.train.batch import cross_entropy, forward, to_float32
from tersenet.train.settings import Fit


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean over samples, for logits (N, classes).

    Source: Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015, section 2: gradients of soft
    targets scale as 1/T^2, so the factor keeps their share when T changes.
    """
    student = functional.log_softmax(logits / temperature, dim=1)
    wanted = functional.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, wanted, reduction="batchmean", log_target=True)


class Objective:
    """loss(inputs, outputs, targets) of one batch: cross entropy or the data's own, mixed with the teacher's if any."""

    def __init__(
        self, settings: Fit, loss: Callable[[Any, Any], Tensor] | None, teacher: nn.Module | None, device: torch.device
    ) -> None:
        """Raises: TersenetError for settings that contradict what there is."""
        if settings.distill is not None and teacher is None:
            raise TersenetError("`distill` learns from the uncompressed network, and none was given as the teacher")
        if settings.label_smoothing and loss is not None:
            raise TersenetError(
                "`label_smoothing` belongs to cross entropy, and the data has a loss of its own: drop one"
            )
        self.settings = settings
        self.loss = loss
        self.device = device
        self.teacher = teacher.to(device).eval() if teacher is not None and settings.distill is not None else None

    def __call__(self, inputs: Any, outputs: Any, targets: Any) -> Tensor:
        if self.loss is not None:
            task = self.loss(outputs, targets)
        else:
            task = cross_entropy(outputs, targets, self.settings.label_smoothing)
        distill = self.settings.distill
        if distill is None or self.teacher is None:
            return task
        with torch.no_grad(), autocast(self.settings, self.device):
            wanted = forward(self.teacher, inputs)
        wanted = to_float32(wanted)
        if not (isinstance(outputs, Tensor) and isinstance(wanted, Tensor) and outputs.dim() == 2):
            raise TersenetError("`distill` needs networks whose outputs are logits (N, classes)")
        if wanted.shape != outputs.shape:
            raise TersenetError(
                f"the teacher gives outputs {tuple(wanted.shape)} and the network {tuple(outputs.shape)}: "
                "`distill` needs the same classes"
            )
        return (1 - distill.weight) * task + distill.weight * soft_loss(outputs, wanted, distill.temperature)


def autocast(settings: Fit, device: torch.device) -> torch.autocast:
    """Mixed precision if `settings.amp`, else nothing."""
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=settings.amp)
