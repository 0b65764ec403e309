"""The base of what looks at every operator that a network runs."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):
    """A dispatch mode without the wrapper that keeps torch.compile out of it: that costs more than most operators,
    and nothing is compiled under a mode."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
