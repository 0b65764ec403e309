"""Times of this machine, taken once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tersenet.environment import installed, processor
from tersenet.kernels import cache
from tersenet.kernels.compiled import Code
from tersenet.kernels.compiled import key as key_of_code
from tersenet.lowering.layers import AnyLayer, is_generated
from tersenet.measuring.turns import Clock, called_in_turns

ROUNDS = (3, 40)
_QUICK = 0.2

Times = dict[str, dict[str, float]]
"""Name -> contender -> median milliseconds."""


def clock() -> Clock:
    """On one thread the time of the processor: other programs on the machine don't change it."""
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


def for_seconds(
    timers: Mapping[str, Callable[[], float]], seconds: float, warm: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, for about `seconds` within the bounds of `ROUNDS`. One pass of each, or two
    quick ones, come before and don't count; `warm` is called when they are over."""
    first = [timer() for timer in timers.values()]
    if sum(first) < _QUICK * seconds * 1e3:  # then it is worth knowing better
        first = [timer() for timer in timers.values()]
    warm()
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(seconds * 1e3 / max(sum(first), 1e-3))))
    return called_in_turns(timers, rounds)


def remembered(
    kind: str,
    what: object,
    contenders: Mapping[str, Iterable[str]],
    measure: Callable[[], Times],
    kernels: Iterable[tuple[AnyLayer, str]],
) -> Times:
    """What `measure` gives, or gave on this machine before.

    Args:
        kind: the first word of the file's name.
        what: all that decides about times, but for this machine, its versions and threads; its `repr` is compared.
        contenders: name -> contenders, as `measure` returns them.
        kernels: layers and choices that take part, so that times of older generated code are not taken.
    """
    key = machine_key(what, kernels)
    name = f"{kind}-{hashlib.sha256(key).hexdigest()[:24]}"
    expected = {one: sorted(found) for one, found in contenders.items()}
    known = _read(cache.read(name, key), expected)
    if known is None:
        known = measure()
        cache.write(name, key, json.dumps(known).encode())
    return known


def machine_key(what: object, kernels: Iterable[tuple[AnyLayer, str]]) -> bytes:
    """`what` on this machine, with these versions, threads, and code of the layers' generated choices."""
    code = {key_of_code(algorithm) for algorithm in {_code(*one) for one in kernels if is_generated(one[1])}}
    versions = (torch.__version__, torch.backends.cpu.get_cpu_capability(), installed("tersenet"))
    return repr((processor(), versions, torch.get_num_threads(), sorted(code), what)).encode()


def _code(layer: AnyLayer, choice: str) -> Code:
    return layer.algorithm(choice)


def _read(data: bytes | None, expected: dict[str, list[str]]) -> Times | None:
    """What `cache.read` found whole; None if it is not what this version writes."""
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        return None
    if not isinstance(found, dict) or not all(isinstance(times, dict) for times in found.values()):
        return None
    if {name: sorted(times) for name, times in found.items()} != expected:
        return None
    times = [value for one in found.values() for value in one.values()]
    return found if all(isinstance(value, float) and value > 0 for value in times) else None
