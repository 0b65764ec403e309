"""tersenet recipe list | show | copy | check | schema. None of them imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tersenet.cli.console import columns, examples, show
from tersenet.cli.options import JsonOption
from tersenet.errors import TersenetError

app = typer.Typer(help="List, show, copy and check recipes.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or a file.", show_default=False)]


@app.command("list", epilog=examples("tersenet recipe list", "tersenet recipe list --json"))
def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with tersenet."""
    from tersenet.recipe_shipped import descriptions

    found = descriptions()
    document = {"recipes": [{"name": name, "description": text} for name, text in found.items()]}
    show(document, lambda: columns(("RECIPE", "WHAT IT DOES"), found.items()), as_json)


@app.command(
    "show", epilog=examples("tersenet recipe show sfp_resnet56_cifar10", "tersenet recipe show my.yaml --json")
)
def show_recipe(name: NameArgument, as_json: JsonOption = False) -> None:
    """Print a recipe as it is written; with --json, checked and with every default filled in."""
    from tersenet.recipe import load_recipe
    from tersenet.recipe_shipped import find
    from tersenet.recipe_yaml import read_text

    if as_json:
        show(load_recipe(name).model_dump(mode="json"), str, as_json)
    else:
        print(read_text(find(name)), end="")


@app.command(
    epilog=examples(
        "tersenet recipe copy sfp_resnet56_cifar10",
        "tersenet recipe copy sfp_resnet56_cifar10 mine.yaml",
    )
)
def copy(
    name: NameArgument,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to; by default NAME.yaml here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a recipe to a file of your own, comments included, to edit it."""
    from tersenet.atomic import write_text
    from tersenet.recipe_shipped import find
    from tersenet.recipe_yaml import read_text

    source = find(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise TersenetError(f"{target} exists already; give another file, or --force to overwrite it")
    write_text(target, read_text(source))
    show({"recipe": name, "file": str(target)}, lambda: f"{target} written; run it with --recipe {target}", as_json)


@app.command(
    epilog=examples("tersenet recipe check mine.yaml", "tersenet recipe check recipes/*.yaml --set steps.0.rate=0.4")
)
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Files or names.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEYS=VALUE", help="As in compress.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check recipes: OK, or every error with its file and line (exit code 1)."""
    results = [_checked(file, overrides or []) for file in files]
    show({"files": results}, lambda: "\n".join(map(_verdict, results)), as_json)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


@app.command(epilog=examples("tersenet recipe schema > tersenet.schema.json"))
def schema(
    as_json: Annotated[bool, typer.Option("--json", help="No difference: a schema is JSON.")] = False,
) -> None:
    """Print the JSON schema of recipes, with the settings of every method, for editors."""
    from tersenet.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def _checked(file: str, overrides: list[str]) -> dict[str, Any]:
    from tersenet.recipe import load_recipe
    from tersenet.recipe_problems import RecipeError

    try:
        load_recipe(file, overrides)
    except RecipeError as error:
        return {"file": file, "ok": False, "errors": error.problems}
    except TersenetError as error:
        return {"file": file, "ok": False, "errors": [str(error)]}
    return {"file": file, "ok": True, "errors": []}


def _verdict(result: dict[str, Any]) -> str:
    return f"{result['file']}: OK" if result["ok"] else "\n".join(result["errors"])
