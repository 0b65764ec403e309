"""What pydantic found wrong with a recipe, said in the recipe's own terms: place, value, rule and the way out."""

from __future__ import annotations

import json
import typing
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from tersenet.errors import TersenetError, nearest
from tersenet.methods.base import METHODS, Method
from tersenet.recipe_yaml import Keys, Problem, Tree, show

_INTEGER = "must be a whole number"
_NUMBER = "must be a number"
_RULES: dict[str, str] = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "int_type": _INTEGER,
    "int_from_float": _INTEGER,
    "float_type": _NUMBER,
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list, such as [a, b]",
    "list_type": "must be a list, such as [a, b]",
    "literal_error": "must be {expected}",
    "dict_type": "must be a table of names and values",
    "missing": "missing, and required",
}


class RecipeError(TersenetError):
    """A recipe that can't be used. `problems` has one line per error, in the order of the file."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.problems = problems
        lines = "".join(f"\n  {line}" for line in problems)
        title = f"recipe {name}" if name else "the recipe"
        super().__init__(problems[0] if len(problems) == 1 else f"{title} has {len(problems)} errors:{lines}")


def refusal(keys: Keys, message: str, value: Any) -> ValidationError:
    """For validators: an error at `keys` below the value that is being validated."""
    # PydanticCustomError fills braces in its message; those of the user's text must stay.
    error = PydanticCustomError("refused", "{message}", {"message": message})
    return ValidationError.from_exception_data("recipe", [InitErrorDetails(type=error, loc=keys, input=value)])


def problems(error: ValidationError, tree: Tree, root: type[BaseModel]) -> list[Problem]:
    """One per place in the recipe that is wrong."""
    found: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_keys(detail, tree.value), []).append(detail)
    # Of a union's branches (list or number) the one that fits best tells most: the one with errors deeper inside.
    deepest = [keys for keys in found if not any(len(k) > len(keys) and k[: len(keys)] == keys for k in found)]
    wanted = [keys for keys in deepest if not any(keys[: len(bad)] == bad for bad in tree.spoilt)]
    return [Problem(tree.origin(keys), _message(keys, found[keys], tree, root)) for keys in wanted]


def _message(keys: Keys, details: list[ErrorDetails], tree: Tree, root: type[BaseModel]) -> str:
    rules = list(dict.fromkeys(_rule(detail, keys, tree, root) for detail in details))
    if _NUMBER in rules and _INTEGER in rules:
        rules.remove(_INTEGER)
    # Messages of our own validators are complete; pydantic's know the rule but not what the field is for.
    about = _about(keys, tree, root) if all(detail["type"] in _RULES for detail in details) else ""
    return f"{_subject(keys, details[0])}: {' or '.join(rules)}{about}"


def _keys(detail: ErrorDetails, value: Any) -> Keys:
    """The place in the file: pydantic's, without the names it adds for the branches of a union."""
    keys: list[str | int] = []
    for item in detail["loc"]:
        if isinstance(value, dict) and item in value:
            value = cast("dict[str | int, Any]", value)[item]
        elif isinstance(value, list) and isinstance(item, int) and item < len(cast("list[Any]", value)):
            value = cast("list[Any]", value)[item]
        elif not (detail["type"] == "missing" and item == detail["loc"][-1]):
            continue
        keys.append(item)
    return tuple(keys)


def _subject(keys: Keys, detail: ErrorDetails) -> str:
    name = show(keys) or "recipe"
    value = detail["input"]
    if detail["type"] in ("missing", "extra_forbidden") or isinstance(value, dict | list | tuple | BaseModel):
        return name
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{name} = {text if len(text) <= 60 else text[:57] + '...'}"


def _rule(detail: ErrorDetails, keys: Keys, tree: Tree, root: type[BaseModel]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown(str(keys[-1]), _names(_model_at(keys[:-1], tree, root)))
    if kind == "model_type":
        return f"must be a table of fields: {', '.join(_names(_model_at(keys, tree, root)))}"
    if kind in _RULES:
        return _RULES[kind].format(**detail.get("ctx", {}))
    return detail["msg"].removeprefix("Value error, ")


def _unknown(name: str, known: list[str]) -> str:
    near = nearest(name, known)
    if near:
        return f"unknown key; did you mean {' or '.join(near)}?"
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"


def _about(keys: Keys, tree: Tree, root: type[BaseModel]) -> str:
    """The first sentence of the field's documentation, in brackets."""
    owner = _model_at(keys[:-1], tree, root) if keys else None
    field = owner.model_fields.get(str(keys[-1])) if owner else None
    text = " ".join((field.description or "").split()) if field else ""
    sentence = text.split(". ")[0].rstrip(".;")
    return f" ({sentence})" if sentence else ""


def _names(model: type[BaseModel] | None) -> list[str]:
    if model is None:
        return []
    return ["method", *model.model_fields] if issubclass(model, Method) else list(model.model_fields)


def _model_at(keys: Keys, tree: Tree, root: type[BaseModel]) -> type[BaseModel] | None:
    """The settings class that the table at `keys` is read into; None if it is free-form."""
    model: type[BaseModel] | None = root
    value: Any = tree.value
    for key in keys:
        inside: dict[Any, Any] = (
            dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {}
        )
        value = inside.get(key)
        if isinstance(key, str):
            field: FieldInfo | None = model.model_fields.get(key) if model else None
            model = _model_in(field.annotation) if field else None
        if model is Method and isinstance(value, dict):
            model = METHODS.get(str(cast("dict[str, Any]", value).get("method")), Method)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first settings class in `Settings | None`, `tuple[Settings, ...]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
