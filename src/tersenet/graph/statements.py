"""What the source of a network's code says about one of its lines."""

from __future__ import annotations

import ast
import linecache
from functools import lru_cache

from tersenet.graph.trace import Place


@lru_cache(maxsize=512)
def _parsed(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


def attributes_at(place: Place) -> list[str]:
    """Names of `self`'s attributes in the statement at a line, and in what its local names were assigned from."""
    return list(_attributes_at(place.file, place.line))


@lru_cache(maxsize=4096)
def _attributes_at(file: str, line: int) -> tuple[str, ...]:
    tree = _parsed(file)
    if tree is None:
        return ()
    covering = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or n.lineno)]
    functions = [n for n in covering if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    if not functions:
        return ()
    statement = min(covering, key=lambda n: ((n.end_lineno or n.lineno) - n.lineno, -n.lineno, -n.col_offset))
    names = _self_attributes(statement)
    used = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
    function = max(functions, key=lambda n: n.lineno)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            if targets & used:
                names += _self_attributes(node.value)
    return tuple(dict.fromkeys(names))


def _self_attributes(tree: ast.AST) -> list[str]:
    return [
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    ]
