"""Saved networks: what comes back, what is refused, and what a crash or a full disk leaves."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import pickle
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_support import code_pickle
from run_support import Net, files, same
from tersenet.errors import ArtifactError, TersenetError
from tersenet.exporting import artifact
from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import attach, record_of
from tersenet.models.open import Source, example_of


def small(seed: int = 0) -> nn.Module:
    """A compacted ResNet-8 with adapters in it."""
    return copy.deepcopy(_small(seed))


@functools.cache
def _small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return compacted(Source("resnet8", arguments=(("width", 2),)).open((3, 8, 8)), "independent")


def compacted(model: nn.Module, residual: Any, constants: Any = "auto") -> nn.Module:
    """With half of every group gone, and batch norms that leave constants behind."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    graph = ModelGraph(model, example_of(model, batch=2), residual)
    compact(graph, {g.name: torch.arange(g.size // 2).numpy() for g in graph.groups if g.frozen is None}, constants)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return artifact.save(small(), tmp_path / "m")


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Forges model.json, with the right checksum."""
    path = folder / "model.json"
    content = json.loads(path.read_text())
    change(content)
    record = json.dumps(content["record"], sort_keys=True, separators=(",", ":"))
    content["record_sha256"] = artifact.hashlib.sha256(record.encode()).hexdigest()
    path.write_text(json.dumps(content))


def forged(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Forges the tensors, with the right checksum."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    digest = artifact.hashlib.sha256(path.read_bytes()).hexdigest()
    edited(folder, lambda content: content.update(sha256=digest))


def test_a_network_comes_back_bit_equal_and_alike(folder: Path) -> None:
    model, loaded = small(), artifact.load(folder)
    x = torch.randn(3, 3, 8, 8)
    assert same(model, loaded)
    assert record_of(loaded) == record_of(model)
    assert torch.equal(model.eval()(x), loaded(x))
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad for p in loaded.parameters())
    assert files(artifact.save(loaded, folder.parent / "again")) == files(folder)


def test_a_new_process_needs_nothing_but_the_folder(folder: Path) -> None:
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    code = f"""
import torch, tersenet
torch.load = None
x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
print(tersenet.load({str(folder)!r})(x).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), small().eval()(x).detach())


def test_files_are_as_readable_as_any_other(folder: Path) -> None:
    (folder / "other").touch()
    modes = {
        name: stat.S_IMODE((folder / name).stat().st_mode) for name in ("other", "model.safetensors", "model.json")
    }
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("residual", ["independent", "coupled"])
def test_a_users_own_module_with_shared_weights(tmp_path: Path, residual: str) -> None:
    torch.manual_seed(0)
    model = compacted(Source(Net()).open((1, 8, 8)), residual)
    artifact.save(model, tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"own module: pass a fresh one, tersenet\.load\(folder, base=Net\(\)\)"):
        artifact.load(tmp_path / "m")
    loaded = artifact.load(tmp_path / "m", base=Net())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), loaded(x))
    assert loaded.twin.weight is loaded.head.weight
    artifact.save(loaded, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"does not have|does not fit|whose shape is"):
        artifact.load(tmp_path / "m", base=nn.Sequential(nn.Linear(2, 2)))


def test_a_base_that_was_compressed_before(tmp_path: Path) -> None:
    """Only what was done after is done to it again; other edits can't be."""
    first = compacted(Source(Net()).open((1, 8, 8)), "coupled", "zero")
    base = artifact.load(artifact.save(first, tmp_path / "first"), base=Net())
    second = compacted(first, "coupled", "zero")
    artifact.save(second, tmp_path / "second")
    for start in (base, Net()):
        assert same(artifact.load(tmp_path / "second", base=start), second)
    with pytest.raises(ArtifactError, match="changed in another way; pass a fresh one"):
        artifact.load(tmp_path / "first", base=second)


def test_other_floating_numbers_are_kept(tmp_path: Path) -> None:
    model = small().half()
    artifact.save(model, tmp_path / "m")
    assert same(artifact.load(tmp_path / "m"), model)


def test_what_has_no_record_or_place(tmp_path: Path) -> None:
    with pytest.raises(TersenetError, match="Linear has no record of how it was built"):
        artifact.save(nn.Linear(1, 1), tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TersenetError, match="is not a folder"):
        artifact.save(small(), tmp_path / "file")
    assert files(tmp_path) == {"file": b"mine"}


# Damage


def test_model_json_cut_off_anywhere(folder: Path) -> None:
    path = folder / "model.json"
    content = path.read_bytes()
    for length in random.Random(0).sample(range(len(content) - 1), 200):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            artifact.read_manifest(folder)


def test_a_flipped_bit_in_model_json_is_found_or_changes_nothing(folder: Path) -> None:
    path = folder / "model.json"
    content, whole = path.read_bytes(), artifact.read_manifest(folder)
    chance = random.Random(0)
    refused = 0
    for place in chance.sample(range(len(content)), 500):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = artifact.read_manifest(folder)
        except ArtifactError:
            refused += 1
        else:
            # The checksum of the tensors is not checked here.
            assert found.model_copy(update={"sha256": whole.sha256}) == whole, place
    assert refused > 250


def test_the_tensors_cut_off_or_flipped_anywhere(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    chance = random.Random(0)
    for length in chance.sample(range(len(content)), 50):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged: its checksum"):
            artifact.load(folder)
    for place in chance.sample(range(len(content)), 50):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged: its checksum"):
            artifact.load(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        artifact.load(folder)


# Forgery


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(tensors="../../x"), r"tensors: .*'\.\./\.\./x'"),
        (lambda m: m.update(tensors="/etc/passwd"), "tensors: "),
        (lambda m: m.update(version=2), "format version 2; this tersenet reads 1"),
        (lambda m: m.update(code="x"), "code: "),
        (lambda m: m["record"].update(base="../../x"), r"unknown model '\.\./\.\./x'"),
        (lambda m: m["record"].update(base="os:getcwd"), "os:getcwd, which only you can vouch for"),
        (lambda m: m["record"].update(base="resnet9"), "did you mean"),
        (lambda m: m["record"]["arguments"].update(classes=10**9), "classes=1000000000 must be an integer from 1"),
        (lambda m: m["record"]["arguments"].update(width=10**30), "width"),
        (lambda m: m["record"]["arguments"].update(width=2.0), r"width=2\.0 must be an integer"),
        (lambda m: m["record"]["arguments"].update(device="cuda"), "argument of model 'resnet8' 'device'"),
        (lambda m: m["record"]["input"].update(shape=[65536] * 4), "at most"),
        (lambda m: m["record"]["input"].update(mean=[float("nan")]), "mean.0: .*finite"),
        (lambda m: m["record"]["edits"][0]["slices"][0].update(keep="0-9000000"), "keeps index 9000000"),
        (lambda m: m["record"].update(edits=m["record"]["edits"] * 2), "edit"),
        (lambda m: m["record"]["edits"].append(ADAPT | {"module": ""}), "wraps the whole network"),
        (lambda m: m["record"]["edits"].append(ADAPT | {"width": 10**7}), "does not fit"),
        (lambda m: m["record"]["edits"].extend([ADAPT | {"width": 10**7}] * 5), "more indices than any network"),
        (lambda m: m["record"]["edits"].extend([ADAPT] * 3000), "wrapped already"),
        (lambda m: m["record"]["edits"][0]["attributes"][0].update(name="training"), "attributes.0.name"),
        (lambda m: m["record"]["edits"][0]["attributes"][0].update(name="__class__"), "attributes.0.name"),
    ],
)
def test_a_forged_description_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edited(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


ADAPT = {"kind": "adapt", "module": "linear", "scatter": "0-9", "width": 20}


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[]", "null", '{"version": 1' + "0" * 5000 + "}", "\xff\xfe", "", "\0" * 10],
    ids=["nested lists", "nested tables", "list", "null", "long number", "no text", "empty", "zeros"],
)
def test_a_description_that_is_none(folder: Path, text: str) -> None:
    (folder / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"model\.json"):
        artifact.load(folder)


def test_a_description_too_large_to_be_one(folder: Path) -> None:
    with (folder / "model.json").open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(ArtifactError, match="8,589,93"):
        artifact.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("linear.bias"), r"linear\.bias is missing"),
        (lambda t: t.update(other=torch.zeros(1)), "other is unexpected"),
        (lambda t: t.update({"linear.bias": torch.zeros(3)}), r"linear\.bias has shape \(3,\) in place of \(10,\)"),
        (lambda t: t.update({"linear.bias": torch.zeros(10).long()}), r"linear\.bias is torch\.int64 in place of"),
        (lambda t: t.update({"linear.bias": torch.zeros(10).to(torch.float8_e5m2)}), "float8"),
    ],
)
def test_forged_tensors_are_refused(folder: Path, change: Any, message: str) -> None:
    forged(folder, change)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(folder)


@pytest.mark.parametrize("header", [b"\xff" * 8, (10**6).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"])
def test_tensors_with_an_absurd_header(folder: Path, header: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(header + b"{}" * 50)
    digest = artifact.hashlib.sha256(path.read_bytes()).hexdigest()
    edited(folder, lambda content: content.update(sha256=digest))
    with pytest.raises(ArtifactError, match=r"model\.safetensors can't be read"):
        artifact.load(folder)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.json", "model.safetensors"])
def test_a_pickle_is_never_run(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name not in ("model.json", "model.safetensors"):
        (folder / "model.json").unlink()
    (folder / name).write_bytes(code_pickle())
    with pytest.raises(ArtifactError):
        artifact.load(folder)
    assert capsys.readouterr().out == ""
    pickle.loads((folder / name).read_bytes())
    assert capsys.readouterr().out == "code of a stranger ran\n", "the pickle must be able to"


def test_links(folder: Path) -> None:
    """As caches make them: what they lead to counts by its checksum, and saving replaces the link, not its target."""
    outside = folder.parent / "blob"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert same(artifact.load(folder), small())
    content = outside.read_bytes()
    artifact.save(small(1), folder)
    assert outside.read_bytes() == content
    (folder / "model.safetensors").unlink()
    for target in (folder.parent / "nowhere", Path("/dev/zero"), folder):
        (folder / "model.safetensors").symlink_to(target)
        with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
            artifact.load(folder)
        (folder / "model.safetensors").unlink()


# Crashes and full disks


def crash_points(monkeypatch: pytest.MonkeyPatch, save: Callable[[], object]) -> list[str]:
    """The calls of a save, in order, by which its files change."""
    seen: list[str] = []
    with monkeypatch.context() as patched:
        for module, name in CALLS:
            original = getattr(module, name)
            patched.setattr(module, name, counted(original, name, seen, None, KeyboardInterrupt()))
        save()
    return seen


CALLS: list[tuple[Any, str]] = [(Path, "write_bytes"), (os, "fsync"), (os, "replace")]


def counted(original: Any, name: str, seen: list[str], stop: int | None, error: BaseException) -> Any:
    def call(*arguments: Any, **more: Any) -> Any:
        seen.append(name)
        if stop is not None and len(seen) > stop:
            if name == "write_bytes" and len(seen) == stop + 1:
                # Half of it is on the disk.
                original(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise error
        return original(*arguments, **more)

    return call


class Killed(BaseException):
    """Nothing catches it; and what cleans up does not get to, since every later call raises it too."""


@pytest.mark.parametrize("old", ["nothing", "another", "interrupted"])
def test_killed_anywhere_in_a_save_the_old_or_the_new_network_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    before, after = small(1), small(2)

    def prepared(number: int) -> Path:
        folder = tmp_path / str(number)
        if old != "nothing":
            artifact.save(before, folder)
        if old == "interrupted":
            # As killed between the two replacements: model.json belongs to the tensors beside the others.
            (folder / "model.safetensors").rename(folder / "model.safetensors.new")
            (folder / "model.safetensors").write_bytes(b"of a third network")
        return folder

    trial = prepared(1000)
    points = crash_points(monkeypatch, lambda: artifact.save(after, trial))
    assert points.count("replace") == (4 if old == "interrupted" else 3)
    for stop in range(len(points)):
        folder = prepared(stop)
        seen: list[str] = []
        with monkeypatch.context() as patched:
            for module, name in CALLS:
                patched.setattr(module, name, counted(getattr(module, name), name, seen, stop, Killed()))
            # Killed processes clean nothing up.
            patched.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(Killed):
                artifact.save(after, folder)
        if old == "nothing" and not (folder / "model.json").exists():
            with pytest.raises(ArtifactError, match="is not a saved model"):
                artifact.load(folder)
        else:
            found = artifact.load(folder)
            assert same(found, before) or same(found, after)
        artifact.save(after, folder)
        assert same(artifact.load(folder), after)
        assert not (folder / "model.safetensors.new").exists()


def test_a_full_disk_anywhere_in_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = crash_points(monkeypatch, lambda: artifact.save(small(), folder))
    for stop in range(len(points)):
        artifact.save(small(1), folder)
        before = files(folder)
        seen: list[str] = []
        full = OSError(errno.ENOSPC, "No space left on device")
        with monkeypatch.context() as patched:
            for module, name in CALLS:
                patched.setattr(module, name, counted(getattr(module, name), name, seen, stop, full))
            with pytest.raises(TersenetError, match=r"could not write .*No space left on device\. .*unchanged"):
                artifact.save(small(2), folder)
        if stop < len(points) - 1:
            assert files(folder) == before
        # From the last replacement on, the new network counts, under its temporary name.
        assert same(artifact.load(folder), small(1 if stop < len(points) - 1 else 2))


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder = artifact.save(small(1), small_disk / "m")
    before = files(folder)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    page = 4096
    left = 0
    while True:
        (small_disk / "ballast").write_bytes(b"x" * (free - left))
        try:
            artifact.save(small(2), folder)
            break
        except TersenetError as error:
            message = str(error)
        assert "No space left on device" in message
        assert files(folder) == before
        (small_disk / "ballast").unlink()
        left += page
    assert left > page
    assert same(artifact.load(folder), small(2))


def test_a_stale_record_is_no_way_in(tmp_path: Path) -> None:
    """What a record in memory says is checked like what a file says."""
    model = small()
    record = record_of(model)
    assert record is not None
    attach(model, record.model_copy(update={"base": "../x"}))
    artifact.save(model, tmp_path / "m")
    with pytest.raises(ArtifactError, match="unknown model"):
        artifact.load(tmp_path / "m")
