"""A recipe: a model, its data, a target and the ordered steps, as one frozen record that is read from YAML.

Reading one imports every method's settings but never torch. All errors of a file are reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)
from pydantic.json_schema import models_json_schema

from tersenet.data.registry import DataSettings
from tersenet.errors import TersenetError, nearest
from tersenet.methods.base import Method, all_methods
from tersenet.models.registry import entry
from tersenet.recipe_overrides import assign
from tersenet.recipe_problems import RecipeError, problems, refusal
from tersenet.recipe_shipped import find
from tersenet.recipe_target import TargetText
from tersenet.recipe_yaml import Origin, Problem, Tree, read

Overrides = Mapping[str, Any] | Iterable[str]


@contextmanager
def _refusing() -> Generator[None]:
    """Inside a validator: our own errors as the kind that pydantic collects."""
    try:
        yield
    except TersenetError as error:
        raise ValueError(str(error)) from error


def _step(value: Any, info: ValidationInfo) -> Any:
    """Settings of the class that `method:` names. Raises: ValidationError."""
    if not isinstance(value, dict):
        return value
    settings = dict(cast("dict[str, Any]", value))
    name = settings.pop("method", None)
    methods = all_methods()
    if name is None:
        raise refusal((), f"the field `method` is missing; it is one of {', '.join(methods)}", settings)
    if not isinstance(name, str) or name not in methods:
        near = nearest(str(name), methods)
        offer = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(methods)}"
        raise refusal(("method",), f"unknown method; {offer}", name)
    with _refusing():
        if info.mode == "json":
            return methods[name].model_validate_json(json.dumps(settings), strict=True)
        return methods[name].model_validate(settings)


class Recipe(BaseModel):
    """What to do to a network. `model`, `data` and `target` may be left to the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = ""
    """A short name for reports; the file's name by default."""
    description: str = ""
    """One sentence for `tersenet recipe list`."""
    source: str = ""
    """The paper or page that the settings come from."""
    model: str | None = None
    """A built-in model, `package.module:function`, or a saved folder."""
    model_arguments: dict[str, Any] = {}
    """Arguments of the model's constructor that differ from the named model's own, such as `classes`."""
    weights: str | None = None
    """A file of weights to start from; without one, training starts from random weights."""
    data: DataSettings | None = None
    """The data set and how it is fed."""
    target: TargetText | None = None
    """A budget that the compressed network must meet: macs=50%, macs=40M, params=0.3M."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides every random draw: initial weights, the order of the data, augmentation, the validation split."""
    steps: tuple[Annotated[Method, BeforeValidator(_step)], ...] = Field(json_schema_extra={"minItems": 1})
    """What is done, in this order; each step names its `method`."""

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, value: str | None) -> str | None:
        if value and ":" not in value and not Path(value).exists():
            with _refusing():
                entry(value)
        return value

    @field_validator("steps")
    @classmethod
    def _has_steps(cls, value: tuple[Method, ...]) -> tuple[Method, ...]:
        # Not `min_length`: that would complain of too few steps whenever one of them has an error of its own.
        if not value:
            raise ValueError("a recipe needs at least one step")
        return value

    @field_serializer("steps")
    def _with_method_names(self, steps: tuple[Method, ...], info: FieldSerializationInfo) -> list[dict[str, Any]]:
        mode = "json" if info.mode_is_json() else "python"
        return [{"method": step.method, **step.model_dump(mode=mode)} for step in steps]


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = ()) -> Recipe:
    """A shipped recipe by name, a YAML file, or the same as a mapping; with `overrides` put in before it is checked.

    `overrides` are texts such as `steps.0.rate=0.4`, or a mapping from such keys to values.

    Raises:
        RecipeError: with every error of the recipe, each with its file and line.
        UnknownNameError: no shipped recipe has this name.
    """
    name, tree = _tree(recipe)
    if isinstance(overrides, Mapping):
        overrides = [f"{keys}={json.dumps(value, ensure_ascii=False)}" for keys, value in overrides.items()]
    for assignment in overrides:
        assign(tree, assignment)
    return _checked(name, tree)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, with the settings of every registered method, for editors and other tools."""
    methods = all_methods()
    references, shared = models_json_schema([(model, "validation") for model in (Recipe, *methods.values())])
    definitions: dict[str, Any] = shared["$defs"]
    choices: dict[str, str] = {}
    for name, model in methods.items():
        choices[name] = references[model, "validation"]["$ref"]
        settings = definitions[choices[name].rpartition("/")[2]]
        settings["properties"] = {"method": {"const": name}, **settings["properties"]}
        settings["required"] = ["method", *settings.get("required", [])]
    recipe = definitions.pop(references[Recipe, "validation"]["$ref"].rpartition("/")[2])
    recipe["properties"]["steps"]["items"] = {
        "oneOf": [{"$ref": reference} for reference in choices.values()],
        "discriminator": {"propertyName": "method", "mapping": choices},
    }
    definitions.pop(Method.__name__, None)
    schema = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": schema, **recipe, "title": "tersenet recipe", "$defs": definitions}


def _tree(recipe: str | Path | Mapping[str, Any] | Recipe) -> tuple[str, Tree]:
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        return str(recipe.get("name", "")), Tree(json.loads(json.dumps(dict(recipe), default=str)), {})
    path = find(recipe)
    tree = read(path)
    if isinstance(tree.value, dict):
        tree.value.setdefault("name", path.stem)
    return str(path), tree


def _checked(name: str, tree: Tree) -> Recipe:
    found = list(tree.problems)
    if isinstance(tree.value, dict):
        try:
            recipe = Recipe.model_validate_json(json.dumps(tree.value), strict=True)
        except ValidationError as error:
            found += problems(error, tree, Recipe)
        else:
            if not found:
                return recipe
    else:
        found.append(Problem(Origin(1, f"{name}:1"), "a recipe is a table of fields, such as `steps:`"))
    raise RecipeError(name, [str(problem) for problem in sorted(found, key=lambda p: p.origin.line)])
