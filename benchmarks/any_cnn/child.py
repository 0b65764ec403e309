"""A function in a process of its own, with limits on its time and memory, that tells what it finds bit by bit."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.any_cnn.ours import one_line

Finder = Callable[[str], Iterator[dict[str, Any]]]


def watched(find: Finder, name: str, seconds: float, gibibytes: float) -> dict[str, Any]:
    """All that `find(name)` yields, in one dict. Whatever it does, this returns: with `result` timeout (more than
    `seconds` of the processor, or no word for five times as long), memory, crash or error, and a `reason`, where it
    did not come to its end."""
    # Forked, so that a child starts with everything imported and warm: one thread, so nothing can be locked.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(find, name, theirs, math.ceil(seconds), gibibytes))
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    try:
        while ours.poll(5 * seconds):
            word = ours.recv()
            if word is None:
                return found
            found |= word
        return found | {"result": "timeout", "reason": f"no word for {5 * seconds:.0f} s{_after(found)}"}
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return found | {"result": "timeout", "reason": f"more than {seconds:.0f} s of the processor{_after(found)}"}
        return found | {"result": "crash", "reason": f"exit code {process.exitcode}{_after(found)}"}
    finally:
        process.kill()
        process.join()


def _after(found: dict[str, Any]) -> str:
    return f" after {list(found)[-1]}" if found else ""


def _tell(find: Finder, name: str, to: Connection, seconds: int, gibibytes: float) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    try:
        for word in find(name):
            to.send(word)
    except Exception as error:
        memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        to.send({"result": "memory" if memory else "error", "reason": one_line(error)})
    to.send(None)
