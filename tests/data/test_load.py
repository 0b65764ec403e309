from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from data_support import shrink_cifar, write_cifar
from tersenet.data.bundle import Data, LoaderAdapter, TensorLoader
from tersenet.data.load import load_data
from tersenet.data.registry import NORMALISATION, DataSettings
from tersenet.errors import TersenetError, UnknownNameError


def tensor_loader(loader: Any) -> TensorLoader:
    assert isinstance(loader, TensorLoader)
    return loader


def test_digits() -> None:
    data = load_data("digits")
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))
    assert data.normalise == NORMALISATION["digits"]
    assert [tensor_loader(x).n for x in (data.train, data.validation, data.test)] == [1294, 144, 359]
    images, labels = next(tensor_loader(data.train).batches(0))
    assert images.shape == (128, 1, 8, 8)
    assert labels.dtype == torch.int64
    pixels = torch.cat([x for x, _ in tensor_loader(data.test).batches(0)])
    assert pixels.mean().abs() < 0.05
    assert abs(pixels.std() - 1) < 0.05


def test_validation_is_apart_and_seeded() -> None:
    data, other = load_data("digits"), load_data("digits", seed=1)
    train, validation = tensor_loader(data.train), tensor_loader(data.validation)
    assert not set(train.order.indices.tolist()) & set(validation.order.indices.tolist())
    assert validation.augment is None
    assert not torch.equal(validation.order.indices, tensor_loader(other.validation).order.indices)
    assert torch.equal(tensor_loader(data.test).images, tensor_loader(other.test).images)


def test_settings_reach_the_loaders() -> None:
    settings = DataSettings(
        source="digits",
        batch_size=10,
        validation=0,
        augment="none",
        normalise="half",
        train_limit=25,
        eval_batch_size=7,
    )
    data = load_data(settings, normalise="none")
    train = tensor_loader(data.train)
    assert data.validation is None
    assert (train.n, len(train), train.augment) == (25, 3, None)
    assert data.normalise == train.normalise == ((0.5,), (0.5,))
    assert len(next(tensor_loader(data.test).batches(0))[0]) == 7


def test_the_weights_normalisation_goes_before_the_sets_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_cifar(monkeypatch)
    write_cifar(tmp_path)
    source = f"cifar10:{tmp_path}"
    assert load_data(source).normalise == NORMALISATION["cifar10"]
    assert load_data(source, normalise="imagenet").normalise == NORMALISATION["imagenet"]
    data = load_data(source, normalise=((0.0,), (2.0,)))
    assert data.normalise == ((0.0,) * 3, (2.0,) * 3)
    assert (data.classes, data.shape) == (10, (3, 32, 32))
    with pytest.raises(TersenetError, match="'imagenet' is for 3 channels, but the images have 1"):
        load_data("digits", normalise="imagenet")


def test_the_batch_is_divided_among_the_ranks() -> None:
    parts = [tensor_loader(load_data("digits", rank=rank, world=4).train) for rank in range(4)]
    assert {len(next(part.batches(0))[0]) for part in parts} == {32}
    with pytest.raises(TersenetError, match=r"batch_size \(=2\) is for all 4 processes together"):
        load_data(DataSettings(source="digits", batch_size=2), world=4)


SET = TensorDataset(torch.zeros(8, 2, 5, 4), torch.arange(8))


def loader() -> DataLoader[Any]:
    return DataLoader(SET, batch_size=4)


def one(outputs: Any, targets: Any) -> torch.Tensor:
    return torch.ones(())


def test_pairs_dicts_and_single_loaders() -> None:
    pair = load_data((loader(), loader()))
    assert isinstance(pair.train, LoaderAdapter)
    assert pair.train.train
    assert isinstance(pair.test, LoaderAdapter)
    assert (pair.validation, pair.classes, pair.shape) == (None, None, (2, 5, 4))
    assert pair.normalise is None
    full = load_data({"validation": loader(), "test": loader(), "loss": one, "metric": one, "classes": 8})
    assert (full.train, full.classes, full.loss, full.metric) == (None, 8, one, one)
    assert full.validation is not None
    single = load_data(loader())
    assert single.train is None
    assert single.test is not None
    assert single.test.n == 8


def test_what_is_ready_stays_as_it_is() -> None:
    data = load_data("digits")
    assert load_data(data) is data
    assert load_data({"test": data.test}).test is data.test
    assert load_data({"test": data.test}).shape == (1, 8, 8)


def test_a_shape_for_inputs_that_are_no_images() -> None:
    batches = [((torch.zeros(4, 7), torch.zeros(4, 2)), torch.zeros(4))]
    assert load_data({"test": batches, "shape": [1, 7, 1]}).shape == (1, 7, 1)
    assert load_data({"test": batches, "shape": (3, 32)}).shape == (3, 32)


@pytest.mark.parametrize("shape", [(7,), (3, 32), (2, 5, 5), (1, 4, 4, 4)])
def test_the_shape_of_inputs_of_any_rank_is_read_off(shape: tuple[int, ...]) -> None:
    data = load_data({"test": [(torch.zeros(4, *shape), torch.zeros(4))]})
    assert data.shape == shape


def test_torchvision_like_datasets_tell_their_classes() -> None:
    loader = DataLoader(SET, batch_size=4)
    SET.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    try:
        assert load_data((loader, None)).classes == 2
    finally:
        del SET.classes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"tets": []}, "did you mean 'test'"),
        ({"classes": 3}, "no train, validation or test loader"),
        ((1, 2, 3), "a tuple of 3"),
        (5, "data: a int; return a Data"),
        ((loader(), SET), "data: test is a Dataset"),
        ({"test": [], "loss": 3}, r"loss \(=3\) must be a function"),
        ({"test": [(["cat", "dog"], [0, 1])]}, "a batch holds a str where a tensor belongs"),
        ({"test": [((), ())]}, "a batch holds a tuple where a tensor belongs"),
        ({"test": [(torch.zeros(4), torch.zeros(4))]}, r"inputs are \(4,\), not \(N, \.\.\.\)"),
        ({"test": loader(), "shape": 32}, r"shape \(=32\) must be the whole numbers of one input"),
        ({"test": loader(), "shape": (3, 0)}, r"shape \(=\(3, 0\)\) must be the whole numbers"),
        ({"test": loader(), "shape": ()}, r"shape \(=\(\)\) must be the whole numbers"),
        ({"test": loader(), "classes": "ten"}, r"data: classes \(='ten'\) must be how many there are"),
        ({"test": loader(), "classes": 0}, r"classes \(=0\) must be"),
        ({"test": [torch.zeros(3)]}, r"must be \(inputs, targets\)"),
    ],
)
def test_what_is_no_data(value: Any, says: str) -> None:
    with pytest.raises(TersenetError, match=says):
        load_data(value)


MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def make():
    return DataLoader(TensorDataset(torch.zeros(8, 3, 4, 4), torch.arange(8)), batch_size=4), None

def broken():
    raise KeyError("no such column")

number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has a module `ownsets_for_test`."""
    (tmp_path / "ownsets_for_test.py").write_text(MODULE)
    (tmp_path / "fails_for_test.py").write_text("import nothing_like_that\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", __import__("sys").path.copy())
    monkeypatch.setattr("sys.modules", __import__("sys").modules.copy())
    return tmp_path


def test_a_function_of_the_current_folder(own: Path) -> None:
    data = load_data("ownsets_for_test:make")
    assert isinstance(data, Data)
    assert (data.name, data.shape, data.test) == ("ownsets_for_test:make", (3, 4, 4), None)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("ownsets_for_test:maek", UnknownNameError, "did you mean 'make'"),
        ("ownsets_for_test:number", TersenetError, "is a int; it must be a function"),
        ("ownsets_for_test:broken", TersenetError, r"KeyError: 'no such column' \(.*ownsets_for_test.py:9\)"),
        ("fails_for_test:make", TersenetError, "importing fails_for_test failed: .*nothing_like_that"),
        ("cifar11:data", UnknownNameError, "unknown data set 'cifar11'; did you mean 'cifar10'"),
        ("no_such_package.sets:make", UnknownNameError, "unknown data set 'no_such_package.sets'"),
    ],
)
def test_functions_that_are_none(own: Path, spec: str, error: type[TersenetError], says: str) -> None:
    with pytest.raises(error, match=says):
        load_data(spec)
