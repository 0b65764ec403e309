from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersenet.errors import ArtifactError, TersenetError
from tersenet.models.build import build
from tersenet.models.registry import Published
from tersenet.models.weights import load_weights, read_state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "best_prec1": 0.9},
        {"model": STATE, "optimizer": {"lr": 0.1}},
        {"model": {"state_dict": STATE}},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()},
        {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_checkpoints_as_scripts_write_them(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path), STATE)


def test_reads_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert same(read_state_dict(str(tmp_path / "x.safetensors")), STATE)


def test_a_prefix_of_only_some_names_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.pt")
    assert list(read_state_dict(tmp_path / "x.pt")) == ["module.a", "b"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_through_a_model(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    source, target = build("resnet8", width=4), build("resnet8", width=4)
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    assert not same(dict(source.state_dict()), dict(target.state_dict()))
    assert load_weights(target, path) is None
    assert same(dict(source.state_dict()), dict(target.state_dict()))


def test_files_without_batch_counters_load(tmp_path: Path) -> None:
    source = build("resnet8", width=4)
    torch.save({n: t for n, t in source.state_dict().items() if "num_batches" not in n}, tmp_path / "x.th")
    target = build("resnet8", width=4)
    load_weights(target, tmp_path / "x.th")
    assert all(map(torch.equal, source.parameters(), target.parameters()))


def test_a_published_file_is_recognised_by_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "renamed.pt"
    torch.save(build("resnet8", width=4).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = Published("original.pt", digest, "resnet8", "imagenet", 0.9, "nowhere")
    monkeypatch.setattr("tersenet.models.weights.PUBLISHED", (known,))
    assert load_weights(build("resnet8", width=4), path) == known
    with pytest.raises(TersenetError, match="known: the published weights of resnet8"):
        load_weights(build("resnet14", width=4), path)


def refused(model: nn.Module, path: Path) -> str:
    """The message, after a check that no tensor of the model has changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TersenetError) as caught:
        load_weights(model, path)
    assert same(before, dict(model.state_dict()))
    return str(caught.value)


def test_another_architecture_says_which_names_and_shapes(tmp_path: Path) -> None:
    torch.save(build("resnet14", width=4, classes=7).state_dict(), tmp_path / "x.pt")
    message = refused(build("resnet8_projection", width=4), tmp_path / "x.pt")
    assert "this ResNetCifar, which is unchanged" in message
    # two projections, each a convolution and 4 tensors of batch norm beside the counter
    assert "10 missing in the file: layer2.0.downsample.0.weight, layer2.0.downsample.1.weight, " in message
    # three blocks of two convolutions and batch norms
    assert "36 unknown to the model: layer1.1.conv1.weight, " in message
    assert "2 of another shape: linear.weight is (7, 16) in the file, (10, 16) in the model, linear.bias is" in message
    assert message.count("layer1.1.") == 5


def test_one_differing_shape_leaves_all_the_rest_unchanged(tmp_path: Path) -> None:
    torch.save(build("resnet8", width=4, classes=100).state_dict(), tmp_path / "x.pt")
    message = refused(build("resnet8", width=4), tmp_path / "x.pt")
    assert "missing" not in message
    assert "unknown" not in message


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    torch.save(build("resnet8").state_dict(), tmp_path / "x.pt")
    with torch.device("meta"):
        model = build("resnet8")
    with pytest.raises(TersenetError, match="meta device"):
        load_weights(model, tmp_path / "x.pt")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "wrapped", "pickle2", "pickle4"])
def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    evil = Evil(marker)
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(evil, protocol=int(kind[-1])))
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the attack itself must work"
        marker.unlink()
    else:
        content = {"state_dict": STATE, "extra": evil} if kind == "wrapped" else {"a": evil}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    message = refused(build("resnet8", width=4), path)
    assert not marker.exists()
    if kind != "pickle4":  # a pickle of this version ends at its first byte
        assert "would run posix.system, so nothing of it was read" in message


def test_a_pickled_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"would run torch\.nn\.modules\.linear\.Linear.*save its state dict alone"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    model = build("resnet8", width=4)
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    message = refused(model, path)
    assert "is damaged, cut off (" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<html></html>", b"hello world" * 50, b"\0" * 4096])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_another_kind(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a weight file"):
        read_state_dict(path)


def test_a_compressed_archive_is_not_expanded(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as whole, zipfile.ZipFile(tmp_path / "y.pt", "w", 8) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(ArtifactError, match="compressed archive"):
        read_state_dict(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds nothing, not a state dict"),
        ({"state_dict": {}}, "holds nothing, not a state dict"),
        ({"epoch": 3, "weights": STATE}, "'epoch' is a int, not a tensor.*keys state_dict, model"),
        ({"a": torch.zeros(2, device="meta")}, "a must be a dense tensor .* on device meta"),
        ({"a": torch.eye(2).to_sparse()}, "a must be a dense tensor .* not torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a must be a dense tensor .* torch.complex64"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=message):
        read_state_dict(tmp_path / "x.pt")


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="'model' is a dict, not a tensor"):
        read_state_dict(tmp_path / "x.pt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TersenetError, match=r"no weight file at .*nowhere\.pt"):
        read_state_dict(tmp_path / "nowhere.pt")
    with pytest.raises(TersenetError, match="it is a folder"):
        read_state_dict(tmp_path)
