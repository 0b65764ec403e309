"""`--set steps.0.rate=0.4`: values of the command line put into a recipe before it is checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from tersenet.errors import TersenetError
from tersenet.recipe_yaml import Keys, Origin, Problem, Tree, parse, show

_AFTER_THE_FILE = 10**9
_KEY = re.compile(r"[^.\[\]]+")


def assign(tree: Tree, assignment: str) -> None:
    """Put in `KEYS=VALUE` (`steps.0.rate=0.4`), VALUE in YAML. What doesn't fit becomes a problem."""
    origin = Origin(_AFTER_THE_FILE, f"--set {assignment}")
    path, equals, text = assignment.partition("=")
    keys = tuple(_keys(path))
    if not equals or not keys:
        tree.problems.append(Problem(origin, "must be KEYS=VALUE, such as steps.0.rate=0.4"))
        return
    try:
        given = parse(text, "")
    except TersenetError as error:
        tree.problems.append(Problem(origin, f"the value {text!r} is not understood{error}"))
        return
    tree.problems += [Problem(origin, problem.message) for problem in given.problems]
    where = _put(tree, keys, given.value, origin)
    tree.spoilt |= {where + inner for inner in given.spoilt}


def _put(tree: Tree, keys: Keys, value: Any, origin: Origin) -> Keys:
    """Replace the value at `keys`; tables that are missing on the way are made. Returns where it is now."""
    place: Any = tree.value
    here: Keys = ()
    for depth, key in enumerate(keys):
        key = str(key) if isinstance(place, dict) else key
        refused = _refused(place, here, key)
        if refused:
            tree.problems.append(Problem(origin, refused))
            return here
        here = (*here, key)
        if depth == len(keys) - 1:
            place[key] = value
        elif isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
            tree.origins[here] = origin
        place = place[key]
    tree.origins = {k: o for k, o in tree.origins.items() if k[: len(here)] != here}
    tree.origins[here] = origin
    return here


def _keys(path: str) -> Iterator[str | int]:
    for key in _KEY.findall(path.strip()):
        yield int(key) if key.isdecimal() else key


def _refused(place: Any, here: Keys, key: str | int) -> str:
    """Why `place`, which stands at `here`, can't have a value at `key`; empty if it can."""
    if isinstance(place, dict):
        return ""
    if not isinstance(place, list):
        return f"{show(here)} is a single value; it has no {key!r} inside"
    count = len(cast("list[Any]", place))
    if isinstance(key, int) and key < count:
        return ""
    extent = f"{show(here)} has {count} item(s), counted from 0"
    return f"there is no {show((*here, key))}; {extent}"
