from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from tersenet.data.registry import DEFAULT_NORMALISATION, NAMES, NORMALISATION, DataSettings, normalisation, parse
from tersenet.errors import TersenetError, UnknownNameError


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("digits", ("digits", None)),
        ("cifar10:some/where", ("cifar10", "some/where")),
        ("cifar100:C:\\data", ("cifar100", "C:\\data")),
        ("imagefolder:/data/imagenet", ("imagefolder", "/data/imagenet")),
        ("mine.sets:make", ("mine.sets:make", None)),
        ("sets:Maker.make", ("sets:Maker.make", None)),
    ],
)
def test_parse(spec: str, expected: tuple[str, str | None]) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digit", "did you mean 'digits'"),
        ("cifar11:/data", "'cifar10'"),
        ("", "unknown data set ''"),
        ("my sets:make", "package.module:function"),
    ],
)
def test_an_unknown_name_gets_the_nearest(spec: str, says: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown data set") as caught:
        parse(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("cifar10", "'cifar10:DIR' (`tersenet data fetch cifar10 DIR`"),
        ("cifar100:", "'cifar100:DIR'"),
        ("imagefolder", "'imagefolder:DIR'"),
        ("digits:/tmp", "takes no folder"),
    ],
)
def test_a_missing_or_needless_folder(spec: str, says: str) -> None:
    with pytest.raises(TersenetError) as caught:
        parse(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": "digit"}, "digits"),
        ({"normalise": "imagnet"}, "imagenet"),
        ({"validation": 1.0}, "share below 1"),
        ({"validation": -0.1}, "greater than or equal to 0"),
        ({"validation": True}, "valid integer"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"train_limit": 0}, "greater than or equal to 1"),
        ({"augment": "much"}, "'standard' or 'none'"),
        ({"batchsize": 3}, "Extra inputs"),
    ],
)
def test_settings_refuse(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataSettings.model_validate({"source": "digits"} | change)
    assert says in str(caught.value)


def test_settings_survive_json() -> None:
    for validation in (0, 5000, 0.25):
        settings = DataSettings(source="digits", validation=validation)
        again = DataSettings.model_validate_json(settings.model_dump_json())
        assert again == settings
        assert type(again.validation) is type(validation)


def test_normalisation_fits_the_channels() -> None:
    assert normalisation("half", 1) == ((0.5,), (0.5,))
    assert normalisation("half", 3) == ((0.5,) * 3, (0.5,) * 3)
    assert normalisation("imagenet", 3) == NORMALISATION["imagenet"]
    assert normalisation(((0.1, 0.2), (1.0,)), 2) == ((0.1, 0.2), (1.0, 1.0))
    with pytest.raises(TersenetError, match="'imagenet' is for 3 channels, but the images have 1"):
        normalisation("imagenet", 1)
    with pytest.raises(UnknownNameError, match="did you mean 'imagenet'"):
        normalisation("imagnet", 3)


def test_every_name_has_a_default_normalisation() -> None:
    assert DEFAULT_NORMALISATION.keys() == NAMES.keys()
    assert set(DEFAULT_NORMALISATION.values()) <= NORMALISATION.keys()


def test_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, tersenet.data.registry, tersenet.data.fetch; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
