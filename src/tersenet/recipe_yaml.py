"""YAML as plain values that remember where they stand, so that every later message can name file and line.

Read by `yaml.compose`, which makes nodes and never objects: nothing in a file can run code. Scalars follow YAML 1.2's
core schema, so 1e-3 is a number and `on` is a text (PyYAML's YAML 1.1 has it the other way round).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tersenet.errors import TersenetError

Keys = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
MAX_DEPTH = 20

_CORE = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way: each class has a table of its own)


_Loader.add_implicit_resolver(_CORE + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_CORE + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_CORE + "int", re.compile(r"^[-+]?[0-9]{1,18}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _CORE + "float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


class Origin(NamedTuple):
    """Where a value comes from; `line` only sorts messages, `text` is what they print."""

    line: int
    text: str


class Problem(NamedTuple):
    origin: Origin
    message: str

    def __str__(self) -> str:
        return f"{self.origin.text}: {self.message}" if self.origin.text else self.message


@dataclass
class Tree:
    """Plain values (dict, list, str, int, float, bool, None), the origin of each, and what was wrong on the way."""

    value: Any
    origins: dict[Keys, Origin]
    problems: list[Problem] = field(default_factory=list)
    spoilt: set[Keys] = field(default_factory=set)
    """Where a value could not be read; what stands there now is not the user's, and no second complaint is due."""

    def origin(self, keys: Keys) -> Origin:
        """That of the value at `keys`, or of the nearest value that contains it."""
        while keys and keys not in self.origins:
            keys = keys[:-1]
        return self.origins.get(keys, Origin(0, ""))


def show(keys: Keys) -> str:
    """As users write it: `steps[1].fit.lr`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def read(path: Path) -> Tree:
    """Raises: TersenetError for a file that can't be read, is too large, or is not YAML."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Raises: TersenetError for a file that can't be read, is too large, or is not text."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TersenetError(f"recipe {path} can't be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise TersenetError(f"recipe {path} is larger than {MAX_BYTES:,} bytes; that is no recipe")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TersenetError(f"recipe {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def parse(text: str, name: str) -> Tree:
    """Values of a YAML text; `name` goes before the line number in messages.

    Raises:
        TersenetError: the text is not YAML, or nests or repeats itself (anchors) without bound.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{name}:{mark.line + 1}" if mark and name else name
        begun = f" {error.context} that begins on line {error.context_mark.line + 1}" if error.context_mark else ""
        raise TersenetError(f"{place}: not valid YAML: {error.problem}{begun}") from error
    except (yaml.YAMLError, RecursionError) as error:
        rule = "nested too deeply" if isinstance(error, RecursionError) else f"not valid YAML: {error}"
        raise TersenetError(f"{name}: {rule}") from error
    tree = Tree(None, {})
    tree.value = _Reader(tree, name).plain(node, ()) if node is not None else None
    return tree


class _Reader:
    def __init__(self, tree: Tree, name: str) -> None:
        self.tree = tree
        self.name = name
        self.values = 0

    def plain(self, node: yaml.Node, keys: Keys) -> Any:
        # An anchor that is repeated is one node in many places: what it unfolds to is counted, not what is written.
        self.values += 1
        if self.values > MAX_VALUES or len(keys) > MAX_DEPTH:
            raise TersenetError(
                f"{self.name}: more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} levels, with its anchors (*) "
                "unfolded; that is no recipe"
            )
        self.tree.origins.setdefault(keys, self.origin(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            self.core_tag(node, keys, "seq")
            return [self.plain(item, (*keys, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, keys)

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        self.core_tag(node, keys, "map")
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, "a key must be a plain word")
                continue
            key: str = key_node.value
            here = (*keys, key)
            if key in found:
                first = self.tree.origins[here].text
                self.problem(key_node, f"{show(here)} is given twice (first at {first}); remove one")
                continue
            self.tree.origins[here] = self.origin(key_node)
            found[key] = self.plain(value_node, here)
        return found

    def scalar(self, node: yaml.Node, keys: Keys) -> Any:
        text: str = node.value
        match node.tag.removeprefix(_CORE):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" | "float" as kind:
                return self.number(node, keys, text, kind)
            case _:
                self.core_tag(node, keys, "str")
                return text

    def number(self, node: yaml.Node, keys: Keys, text: str, kind: str) -> int | float | str:
        try:
            number = int(text) if kind == "int" else float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.problem(node, f"{text!r} is not a finite number", keys)
            return 0
        return number

    def core_tag(self, node: yaml.Node, keys: Keys, kind: str) -> None:
        if node.tag != _CORE + kind:
            tag = node.tag.replace(_CORE, "!!")
            self.problem(node, f"the tag {tag} is not allowed: recipes hold plain values only; remove the tag", keys)

    def problem(self, node: yaml.Node, message: str, spoilt: Keys | None = None) -> None:
        if spoilt is not None:
            self.tree.spoilt.add(spoilt)
        self.tree.problems.append(Problem(self.origin(node), message))

    def origin(self, node: yaml.Node) -> Origin:
        line = node.start_mark.line + 1
        return Origin(line, f"{self.name}:{line}" if self.name else "")
