"""Plain training: a baseline before a method, or fine-tuning after one."""

from __future__ import annotations

from typing import ClassVar

from tersenet.methods.base import TrainingMethod


class Train(TrainingMethod):
    """Train the network as it is; its structure stays."""

    method: ClassVar[str] = "train"
