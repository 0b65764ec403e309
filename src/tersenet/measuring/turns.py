"""Times that can be compared: what slows the machine down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

_WARM_SECONDS = 0.2

Clock = Callable[[], int]
"""Nanoseconds, such as `time.perf_counter_ns` or `time.thread_time_ns`."""


def in_turns(
    runners: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock = time.perf_counter_ns
) -> dict[str, list[float]]:
    """Milliseconds of each. Every round runs each once and starts with another one."""
    return called_in_turns({name: partial(timed, run, clock) for name, run in runners.items()}, rounds)


def warm_in_turns(
    runners: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock = time.perf_counter_ns
) -> dict[str, list[float]]:
    """The same where passes for a fifth of a second come before each timed one: what a runner reads is then where a
    loop of its passes finds it. The threads of the one before sleep by then (those of ONNX Runtime wait actively for
    0.1 seconds), and the system has put its own on processors of their own, which takes as long where it packs them."""

    def warm(run: Callable[[], Any]) -> float:
        end = time.perf_counter() + _WARM_SECONDS
        run()
        while time.perf_counter() < end:
            run()
        return timed(run, clock)

    return called_in_turns({name: partial(warm, run) for name, run in runners.items()}, rounds)


def called_in_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The same for functions that take their own time."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for turn in range(rounds if order else 0):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            found[name].append(timers[name]())
    return found


def timed(run: Callable[[], Any], clock: Clock = time.perf_counter_ns) -> float:
    start = clock()
    run()
    return (clock() - start) / 1e6
