from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_support import Batches, data, digest, network, plain_network, settings_of, train

from tersenet.train import distributed
from tersenet.train.evaluate import evaluate
from tersenet.train.recalibrate import recalibrate_bn

SCRIPT = Path(__file__).with_name("parallel_run.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The script under torchrun, as a user starts it."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    done = subprocess.run(
        [*command, "--master-port", str(free_port()), str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_ranks_end_with_the_same_weights_rows_and_counts(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = two_ranks[1]
    assert (first["rank"], second["rank"], first["world"]) == (0, 1, 2)
    for key in ("weights", "rows", "accuracy", "resumed"):
        assert first[key] == second[key], key
    assert first["rows"][-1]["train_loss"] < first["rows"][0]["train_loss"]


def test_recalibrated_statistics_are_the_same_on_all_ranks(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    model = network()
    recalibrate_bn(model, data(rank=0, world=2).train, 3, device=torch.device("cpu"))
    first, second = two_ranks[1]
    assert first["recalibrated"] == second["recalibrated"] == digest(model) != digest(network())


def test_a_parallel_run_resumes_exactly(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert two_ranks[1][0]["resumed"] == two_ranks[1][0]["weights"]


def test_only_rank_0_logs_and_writes(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = two_ranks
    # Six epochs of the whole run, two before the stop and four after it.
    assert (first["logged"], second["logged"]) == (12, 0)
    assert {path.name for path in folder.glob("*.pt")} == {"whole.pt", "stopped.pt", "weights.pt", "plain.pt"}


def test_counts_over_two_ranks_equal_those_of_one_process(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    model = network()
    model.load_state_dict(torch.load(two_ranks[0] / "weights.pt", weights_only=True))
    alone = evaluate(model, Batches(45, 7, 2, shuffle=False), device="cpu")
    together = two_ranks[1][0]["accuracy"]
    assert together["n"] == 45
    assert together["correct"] == alone.correct
    assert together["top5"] == alone.top5
    assert together["loss"] == pytest.approx(alone.loss, rel=1e-6)


def test_two_ranks_train_like_one_process_with_the_whole_batch(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    together = torch.load(two_ranks[0] / "plain.pt", weights_only=True)
    alone = plain_network()
    train(alone, settings_of())
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)


def test_one_process_is_the_same_without_a_group() -> None:
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    model = network()
    assert distributed.data_parallel(model, torch.device("cpu")) is model
    values = torch.ones(2)
    assert distributed.all_reduce_sum(values, torch.device("cpu")) is values
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert distributed.world() == 1


def test_a_group_of_one_trains_like_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with distributed.process_group("cpu") as device:
        assert len(train(network(), settings_of(epochs=1), data=data(), device=device)) == 1
