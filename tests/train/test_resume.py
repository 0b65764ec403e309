"""A run that is stopped anywhere, and called again, ends with the same bits as one that never stopped."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_support import Batches, Recorder, data, everything, network, same, settings_of, train

from tersenet import atomic
from tersenet.errors import ArtifactError, TersenetError
from tersenet.train.hooks import Hooks

KILLED = Path(__file__).with_name("killed_run.py")


class Stop(Recorder):
    """Ctrl-C at the given optimizer step, or after the given epoch's training."""

    def __init__(self, step: int = -1, epoch: int = -1) -> None:
        super().__init__()
        self.step, self.epoch = step, epoch

    def after_step(self, state: Any) -> None:
        super().after_step(state)
        if state.step == self.step:
            raise KeyboardInterrupt

    def after_epoch(self, state: Any) -> dict[str, Any]:
        if state.epoch == self.epoch:
            raise KeyboardInterrupt
        return super().after_epoch(state)


def started(path: Path, hooks: Hooks, **arguments: Any) -> nn.Module:
    model = network()
    usual: dict[str, Any] = {"teacher": network(5)}
    train(model, arguments.pop("settings", everything()), hooks=hooks, checkpoint=path, **(usual | arguments))
    return model


def test_killed_at_random_moments_and_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """Real processes and real SIGKILLs; see the script."""
    done = subprocess.run([sys.executable, str(KILLED), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split("=") for line in done.stdout.split())
    assert facts["final"] == facts["uninterrupted"]
    assert int(facts["kills"]) == 10
    assert int(facts["kills_with_progress"]) >= 4
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint.pt"]


@pytest.mark.parametrize("stop", [{"step": 2}, {"step": 20}, {"epoch": 2}, {"epoch": 5}])
def test_ctrl_c_leaves_whole_files_and_the_run_goes_on_exactly(tmp_path: Path, stop: dict[str, int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path / "c.pt", Stop(**stop))
    assert {path.name for path in tmp_path.iterdir()} <= {"c.pt"}
    hooks = Recorder()
    resumed = started(tmp_path / "c.pt", hooks)
    assert same(resumed, started(tmp_path / "whole.pt", Recorder()))
    assert hooks.steps == 36
    assert ("before_training" in hooks.calls) is (stop == {"step": 2})


def test_a_finished_run_returns_its_weights_and_rows_at_once(tmp_path: Path) -> None:
    first = network()
    rows = train(first, everything(), hooks=Recorder(), checkpoint=tmp_path / "c.pt", teacher=network(5))

    class Poison(Batches):
        def batches(self, epoch: int) -> Any:
            raise AssertionError("a finished run looked at the data")

    again = network(9)
    logged: list[Any] = []
    poison = data(train=Poison(96, 16, 1), validation=Poison(45, 20, 2))
    more = {"hooks": Recorder(), "checkpoint": tmp_path / "c.pt", "teacher": network(5), "log": logged.append}
    assert train(again, everything(), data=poison, **more) == rows
    assert same(first, again)
    assert again[0].weight.is_contiguous()
    assert logged == []


def test_adamw_and_momentum_free_runs_resume_exactly_too(tmp_path: Path) -> None:
    for changes in ({"optimizer": "adamw", "lr": 0.01}, {"momentum": 0.0, "amp": True, "channels_last": False}):
        settings, name = settings_of(**changes), "-".join(changes)
        with pytest.raises(KeyboardInterrupt):
            started(tmp_path / name, Stop(step=10), settings=settings)
        resumed = started(tmp_path / name, Recorder(), settings=settings)
        assert same(resumed, started(tmp_path / (name + "-whole"), Recorder(), settings=settings))


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".c.pt.123.tmp").write_bytes(b"half")
    (tmp_path / ".other.pt.123.tmp").write_bytes(b"not ours")
    train(network(), settings_of(epochs=1), checkpoint=tmp_path / "c.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"c.pt", ".other.pt.123.tmp"}


def test_a_full_disk_is_one_message_and_the_epoch_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path / "c.pt", Stop(epoch=1))
    before = (tmp_path / "c.pt").read_bytes()

    def full(self: Path, content: Any) -> int:
        with self.open("wb") as file:
            file.write(bytes(content)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(TersenetError, match=r"could not write .*c\.pt: No space left"):
            started(tmp_path / "c.pt", Recorder())
    assert (tmp_path / "c.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    assert same(started(tmp_path / "c.pt", Recorder()), started(tmp_path / "whole.pt", Recorder()))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def forge(path: Path) -> None:
    """A pickle that would run code."""

    class Evil:
        def __reduce__(self) -> Any:
            return (path.with_name("ran").touch, ())

    torch.save({"format": 1, "fit": Evil()}, path)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        forge,
        lambda path: path.write_bytes(path.read_bytes()[:-500]),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["flipped bit", "pickle with code", "truncated", "empty", "something else"],
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "c.pt"
    train(network(), settings_of(epochs=1), checkpoint=path)
    damage(path)
    model = network(8)
    with pytest.raises(ArtifactError) as caught:
        train(model, settings_of(epochs=1), checkpoint=path)
    assert str(path) in str(caught.value)
    assert "Delete it to train this step from its start" in str(caught.value)
    assert "--fresh (in Python fresh=True), which removes the whole run" in str(caught.value)
    assert same(model, network(8))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    train(network(), settings_of(), checkpoint=path)
    with pytest.raises(TersenetError, match=r"lr was 0\.05, is 0\.1.*--fresh .*removes the whole run"):
        train(network(), settings_of(lr=0.1), checkpoint=path)
    with pytest.raises(TersenetError, match="seed was 3, is 4"):
        train(network(), settings_of(), checkpoint=path, seed=4)
    other = network()
    other[7] = nn.Linear(8 * 16, 9)
    with pytest.raises(TersenetError, match="other layers"):
        train(other, settings_of(), checkpoint=path)


def test_hook_state_that_can_not_be_read_back_is_found_when_written(tmp_path: Path) -> None:
    class Odd(Hooks):
        def state_dict(self) -> dict[str, Any]:
            return {"where": Path("x")}

    with pytest.raises(TersenetError, match="plain"):
        train(network(), hooks=Odd(), checkpoint=tmp_path / "c.pt")
    assert list(tmp_path.iterdir()) == []


def test_replace_is_what_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    original = atomic.replace
    monkeypatch.setattr(atomic, "replace", lambda path: written.append(path) or original(path))
    train(network(), checkpoint=tmp_path / "c.pt")
    assert written == [tmp_path / "c.pt"] * 3
