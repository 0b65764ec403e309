"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tersenet.data.registry import DataSettings
from tersenet.errors import TersenetError, UnknownNameError
from tersenet.methods.base import TrainingMethod, all_methods
from tersenet.recipe import Recipe, dump, load_recipe, recipe_schema
from tersenet.recipe_problems import RecipeError
from tersenet.recipe_shipped import FOLDER, descriptions, find, shipped
from tersenet.recipe_yaml import MAX_BYTES, parse
from tersenet.train.settings import lr_at

GOOD = """\
model: resnet20
data: {source: digits}
steps:
  - method: train
    fit: {epochs: 2, lr: 1e-3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [problem.replace(f"{path}:", "mine:") for problem in caught.value.problems]


def test_numbers_and_words_are_yaml_1_2(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "description: on\n"))
    assert recipe.steps[0].fit is not None
    assert recipe.steps[0].fit.lr == 0.001
    assert recipe.description == "on"
    assert recipe.name == "mine"
    assert parse("[1e-3, -.5E2, 010, 1_0, no, null, ~, True, '1', 1:30]", "").value == [
        0.001, -50.0, 10, "1_0", "no", None, None, True, "1", "1:30",
    ]  # fmt: skip


def test_all_errors_at_once_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
model: resnet57
modle: resnet20
target: macs=500%
data:
  source: cifar10
  batch_size: many
steps:
  - method: train
    fit: {epochs: 2.5, lr: -1, schedule: steep}
  - method: soft_filter_prunning
  - method: soft_filter_pruning
    rate: 1.5
    rates: {conv1: half}
    exclude: conv1
  - {rate: 0.3}
  - 7
""",
    )
    found = problems(path)
    expected = [
        ("mine:1: model = \"resnet57\": unknown model 'resnet57'; did you mean 'resnet56'",),
        ("mine:2: modle: unknown key; did you mean model",),
        ("mine:3: target = \"macs=500%\": ", "at most 100%"),
        ("mine:5: data.source = \"cifar10\": ", "needs a folder"),
        ("mine:6: data.batch_size = \"many\": must be a whole number (", ),
        ("mine:9: steps[0].fit.epochs = 2.5: must be a whole number (",),
        ("mine:9: steps[0].fit.lr = -1: must be above 0 (",),
        ("mine:9: steps[0].fit.schedule = \"steep\": must be 'constant', 'step', 'cosine' or 'list'",),
        ("mine:10: steps[1].method = \"soft_filter_prunning\": unknown method; did you mean soft_filter_pruning",),
        ("mine:11: steps[2].fit: missing, and required",),
        ("mine:12: steps[2].rate = 1.5: must be below 1 (",),
        ("mine:13: steps[2].rates.conv1 = \"half\": must be a number",),
        ("mine:14: steps[2].exclude = \"conv1\": must be a list",),
        ("mine:15: steps[3]: the field `method` is missing; it is one of ",),
        ("mine:16: steps[4] = 7: must be a table of fields: method",),
    ]  # fmt: skip
    for problem, parts in zip(sorted(found, key=lambda p: (int(p.split(":")[1]), p)), expected, strict=True):
        assert all(part in problem for part in parts), problem


@pytest.mark.parametrize("rate", ["1.0", "-0.1"])
def test_a_rate_outside_its_range(tmp_path: Path, rate: str) -> None:
    text = f"steps:\n  - method: soft_filter_pruning\n    rate: {rate}\n    fit: {{epochs: 1}}\n"
    (problem,) = problems(write(tmp_path, text))
    assert problem.startswith(f"mine:3: steps[0].rate = {rate}: must be ")


def test_overrides_come_before_the_checks(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ["steps.0.fit.epochs=5", "steps[0].fit.lr=1e-5", "data.batch_size=7", "target=macs=50%"]
    recipe = load_recipe(path, overrides)
    assert recipe.steps[0].fit is not None
    assert (recipe.steps[0].fit.epochs, recipe.steps[0].fit.lr) == (5, 1e-5)
    assert recipe.data == DataSettings(source="digits", batch_size=7)
    assert recipe.target == "macs=50%"
    mapping = {"steps.0.fit.epochs": 5, "steps.0.fit.lr": 1e-5, "data.batch_size": 7, "target": "macs=50%"}
    assert load_recipe(path, mapping) == recipe
    # A wrong value in the file does no harm once it is replaced.
    assert load_recipe(write(tmp_path, GOOD.replace("epochs: 2", "epochs: many")), overrides) == recipe


def test_overrides_make_missing_tables(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("data: {source: digits}\n", "")), ["data.source=digits"])
    assert recipe.data == DataSettings(source="digits")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.0.fit.epochs=x", 'steps[0].fit.epochs = "x": must be a whole number'),
        ("steps.3.fit.epochs=1", "there is no steps[3]; steps has 1 item(s), counted from 0"),
        ("steps.first.fit=1", "there is no steps.first;"),
        ("model.x=1", "model is a single value; it has no 'x' inside"),
        ("steps.0.fit.lr", "must be KEYS=VALUE"),
        ("=3", "must be KEYS=VALUE"),
        ("seed=[1, {", "the value '[1, {' is not understood: not valid YAML"),
        ("sede=1", "sede: unknown key; did you mean seed?"),
        ("steps.0.fit.lr=1e999", "'1e999' is not a finite number"),
    ],
)
def test_errors_of_overrides_name_them(tmp_path: Path, override: str, message: str) -> None:
    (problem,) = problems(write(tmp_path, GOOD), override)
    assert problem.startswith(f"--set {override}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "seed: 1\nseed: 2\n", "mine:7: seed is given twice (first at mine:6); remove one"),
        (GOOD + "description: !!python/object/apply:os.getcwd []\n", "mine:6: the tag !!python/object/apply:os.getcwd"),
        (GOOD + "description: !secret x\n", "mine:6: the tag !secret is not allowed"),
        (GOOD + "[1, 2]: x\n", "mine:6: a key must be a plain word"),
        ("steps: [{method: [train]}]\n", "mine:1: steps[0].method: unknown method; did you mean train?"),
        ("steps: []\n", "mine:1: steps: a recipe needs at least one step"),
        ("- a\n", "mine:1: a recipe is a table of fields"),
        ("", "mine:1: a recipe is a table of fields"),
    ],
)
def test_what_a_recipe_must_not_hold(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = problems(write(tmp_path, text))
    assert problem.startswith(message)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: 2\n", ":3: not valid YAML: "),
        ("a: 1\n--- \nb: 2\n", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: *b\n", ":1: not valid YAML: found undefined alias"),
        (BOMB, "more than 10,000 values"),
        ("a: &a [*a]\n", "levels"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("#" * (MAX_BYTES + 1), "is larger than 1,000,000 bytes"),
    ],
)
def test_hostile_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TersenetError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), ("binary.yaml", "UTF-8")):
        with pytest.raises(TersenetError, match=message):
            load_recipe(tmp_path / path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_recipe_fails_with_a_message_only(data: st.DataObject) -> None:
    text = (FOLDER / "sfp_digits.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(text)))
        end = at + data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.text("ab0-:[]{}#&*!|>'\"\n \t%@é", max_size=3)) + text[end:]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TersenetError):
        load_recipe(write(Path(folder), text))


def test_an_anchor_may_be_shared(tmp_path: Path) -> None:
    text = "steps:\n  - {method: train, fit: &fit {epochs: 2, lr: 0.1}}\n  - {method: train, fit: *fit}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.steps[0] == recipe.steps[1]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sfp_resnet56_cifar10'"):
        load_recipe("sfp_resnet56_cifa10")
    with pytest.raises(UnknownNameError, match="tersenet recipe list"):
        find("nothing")


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_come_back_equal(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    if any(isinstance(step, TrainingMethod) for step in recipe.steps):
        # One for any network leaves both to the command line.
        assert (recipe.model is None) == (recipe.data is None)
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe.model_dump(mode="json")) == recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_published_hyper_parameters() -> None:
    """Source: the specification's table of published experiments (section 1.3)."""
    cifar = {
        "sfp_resnet20_cifar10": 0.3,
        "sfp_resnet32_cifar10": 0.3,
        "sfp_resnet56_cifar10": 0.4,
        "sfp_resnet110_cifar10": 0.3,
    }
    for name, rate in cifar.items():
        recipe = load_recipe(name)
        (step,) = recipe.model_dump()["steps"]
        fit = recipe.steps[0].fit
        assert fit is not None
        assert (step["rate"], step["schedule"], fit.epochs, fit.weight_decay, fit.nesterov) == (
            rate,
            "constant",
            200,
            5e-4,
            True,
        )
        assert recipe.data is not None
        assert recipe.data.batch_size == 128
        rates = [lr_at(fit, epoch, 0, 10) for epoch in (0, 1, 59, 60, 119, 120, 159, 160, 199)]
        assert rates == pytest.approx([0.01, 0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])
    for depth in (18, 34, 50, 101):
        recipe = load_recipe(f"sfp_resnet{depth}_imagenet")
        fit = recipe.steps[0].fit
        assert fit is not None
        assert recipe.model_dump()["steps"][0]["rate"] == 0.3
        rates = [lr_at(fit, epoch, 0, 10) for epoch in (0, 29, 30, 60, 90, 99)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001])
        assert (fit.epochs, fit.weight_decay) == (100, 1e-4)
    for name, lr in (("asfp_resnet56_cifar10_pretrained", 0.001), ("asfp_resnet50_imagenet", 0.01)):
        step = load_recipe(name).model_dump()["steps"][0]
        assert (step["schedule"], step["initial_rate"], step["knee"], step["fit"]["lr"]) == ("asymptotic", 0, 0.125, lr)


def test_descriptions_cover_what_is_shipped() -> None:
    found = descriptions()
    assert set(found) == set(shipped())
    assert len(found) >= 13
    assert all(20 < len(text) < 110 for text in found.values())


def test_recipes_in_python() -> None:
    recipe = Recipe.model_validate({"steps": [{"method": "train", "fit": {"epochs": 3}}]})
    assert recipe == Recipe(steps=(all_methods()["train"].model_validate({"fit": {"epochs": 3}}),))
    assert recipe.model_dump()["steps"][0]["method"] == "train"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def test_the_schema_has_every_method() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    mapping = schema["properties"]["steps"]["items"]["discriminator"]["mapping"]
    assert set(mapping) == set(all_methods())
    for name, reference in mapping.items():
        definition = schema["$defs"][reference.removeprefix("#/$defs/")]
        assert definition["properties"]["method"] == {"const": name}
        assert ({"method", "fit"} if issubclass(all_methods()[name], TrainingMethod) else {"method"}) <= set(
            definition["required"]
        )
    assert set(schema["properties"]) == set(Recipe.model_fields)


def test_reading_recipes_imports_no_torch() -> None:
    code = "import sys, tersenet.recipe as r, tersenet.recipe_shipped as s; [r.load_recipe(n) for n in s.shipped()]"
    code += "; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
