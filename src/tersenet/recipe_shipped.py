"""The recipes that come with the package, found by name without reading any method's settings."""

from __future__ import annotations

from pathlib import Path

from tersenet.errors import UnknownNameError
from tersenet.recipe_yaml import read

FOLDER = Path(__file__).with_name("recipes")


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def descriptions() -> dict[str, str]:
    """What each shipped recipe does, in its own words, by name."""
    return {name: str(read(path).value["description"]) for name, path in shipped().items()}


def find(name: str | Path) -> Path:
    """The file of a recipe given by name or path. Raises: UnknownNameError, TersenetError."""
    path = Path(name)
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file():
        return path
    raise UnknownNameError("recipe", str(name), known, "Give a .yaml file or a name from `tersenet recipe list`.")
