"""Seconds of processor and of wall time."""

from __future__ import annotations

import time


class Clock:
    def __init__(self) -> None:
        self._last = time.process_time(), time.perf_counter()

    def lap(self) -> list[float]:
        """[processor, wall] seconds since the last lap."""
        before, self._last = self._last, (time.process_time(), time.perf_counter())
        return [round(b - a, 4) for a, b in zip(before, self._last, strict=True)]
