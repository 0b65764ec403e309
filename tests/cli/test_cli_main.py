"""What all commands share: help, errors, exit codes, start-up without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tersenet import api
from tersenet.cli import models
from tersenet.errors import TersenetError
from tersenet.kernels.host import ISAS, Host

Cli = Callable[..., tuple[int, str, str]]

COMMANDS = [
    ("compress",), ("train",), ("eval",), ("measure",), ("export",), ("report",), ("models",), ("doctor",),
    ("sensitivity",), ("search",), ("data", "list"), ("data", "fetch"),
    ("recipe", "list"), ("recipe", "show"), ("recipe", "copy"), ("recipe", "check"), ("recipe", "schema"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_json_and_examples_that_name_it(cli: Cli, command: tuple[str, ...]) -> None:
    code, out, err = cli(*command, "--help")
    assert (code, err) == (0, "")
    assert "--json" in out
    assert f"tersenet {' '.join(command)}" in out.partition("Examples")[2]


def test_no_arguments_show_the_help(cli: Cli) -> None:
    code, out, _ = cli()
    assert code == 0
    assert all(command[0] in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compres",), "'compress'"),
        (("recipe", "chek"), "'check'"),
        (("compress", "--recpe", "x"), "--recipe"),
        (("compress", "resnet20"), "Missing option '--recipe'"),
        (("eval", "resnet20", "--data", "digits", "--batch-size", "0"), "Invalid value for '--batch-size'"),
    ],
)
def test_a_command_line_that_is_not_understood(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "--help" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "resnet20", "--recipe", "sfp_digitz"), "unknown recipe 'sfp_digitz'; did you mean 'sfp_digits'"),
        (("eval", "resnet20", "--data", "digit"), "unknown data set 'digit'; did you mean 'digits'?"),
        (("eval", "resnet21", "--data", "digits"), "unknown model 'resnet21'"),
        (("measure", "resnet20", "--input", "32"), "--input 32 must be channels x height x width"),
        (("export", "resnet20", "x.pt"), "x.pt must end in .pt2 (torch.export) or .onnx"),
        (("report", "nowhere"), "nowhere/report.json can't be read (No such file or directory)"),
        (("train", "resnet20", "--data", "digits"), "--epochs N"),
        (("train", "resnet20", "--data", "digits", "--recipe", "sfp_digits"), "does more than train"),
        (("data", "fetch", "digits", "x"), "unknown data set to fetch 'digits'"),
    ],
)
def test_errors_of_the_user_are_one_line_and_code_1(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TersenetError("no"), 1, "error: no\n"),
        (OSError(28, "No space left on device", "x.pt"), 1, "error: x.pt: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_main_catches(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(models, "show", raising(error))
    assert cli("models") == (code, "", message)


def test_an_interrupted_run_says_where_it_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, on_event: Callable[[dict[str, object]], None], **__: object) -> None:
        on_event({"event": "step_start", "index": 0, "steps": 2, "method": "train"})
        row = {"epoch": 4, "epochs": 9, "lr": 0.1, "train_loss": 0.5, "val_top1": 0.5, "seconds": 1.0}
        on_event({"event": "epoch", **row})
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "compress", interrupted)
    code, out, err = cli("compress", "resnet8", "--recipe", "sfp_digits")
    assert (code, out) == (130, "")
    last = err.splitlines()[-1]
    assert last == "interrupted; the same command goes on from epoch 5 of 9 of step 1/2 train"


LIGHT = [("--help",), ("recipe", "list"), ("recipe", "check", "sfp_digits"), ("models",), ("data", "list")]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_no_torch(arguments: tuple[str, ...]) -> None:
    code = f"""
import sys
from tersenet.cli.main import main
try:
    main({list(arguments)!r})
except SystemExit as ended:
    print(sorted({{"torch", "numpy", "matplotlib", "sklearn"}} & set(sys.modules)), ended.code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[] 0\n"


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m tersenet recipe schema | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_version(cli: Cli) -> None:
    code, out, _ = cli("--version")
    assert code == 0
    assert out.startswith("tersenet 0.")


def test_lists_as_json(cli: Cli) -> None:
    names = {entry["name"] for entry in json.loads(cli("models", "--json")[1])["models"]}
    assert {"resnet8", "resnet56", "resnet50", "vgg16_bn", "preresnet110"} <= names
    assert {entry["name"] for entry in json.loads(cli("data", "list", "--json")[1])["data"]} >= {"digits", "cifar10"}


def test_doctor(cli: Cli) -> None:
    code, out, err = cli("doctor", "--json")
    facts = json.loads(out)
    assert (code, err) == (1 if facts["problems"] else 0, "")
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["torch"]["threads"] >= 1
    assert facts["cpu"]["usable_cores"] >= 1


def test_doctor_says_which_kernels_run_and_why_others_do_not(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(processor: Host) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr("tersenet.kernels.host.host", lambda: processor)
        return json.loads(cli("doctor", "--json")[1])["kernels"], cli("doctor")[1]

    plain, avx2 = ISAS["x86"][2], ISAS["x86"][1]
    facts, text = on(Host("old", frozenset([*plain.needs, *avx2.needs]), "x86", 1 << 20))
    assert facts["instructions"] == ["avx2", "sse"]
    assert facts["half"]
    assert "avx512f" in facts["missing"]["avx512"]
    assert "F2, F4, F6 with avx2, sse; weights of 16 bits too; not avx512: this processor has no avx512f" in text
    facts, text = on(Host("strange", frozenset(), "riscv64", 1 << 20))
    assert facts["instructions"] == []
    assert "none: there are no generated kernels for this processor (riscv64, strange)" in text


def test_doctor_says_whether_triton_kernels_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing ones are no problem: nothing needs them."""
    monkeypatch.setattr("tersenet.kernels.gpu.host.problem", lambda: "there is no GPU")
    assert json.loads(cli("doctor", "--json")[1])["torch"]["triton"]["missing"] == "there is no GPU"
    code, text, _ = cli("doctor")
    assert "gpu kernels" in text
    assert "none: there is no GPU" in text
    monkeypatch.setattr("tersenet.kernels.gpu.host.problem", lambda: None)
    monkeypatch.setattr("tersenet.environment.version", lambda package: "3.9.0")
    assert (cli("doctor")[0], "F2, F4, F6 by Triton 3.9.0" in cli("doctor")[1]) == (code, True)


def test_doctor_names_what_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["no-such-package>=1.2", "numpy>=9999.1", "pytest>=1; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: wanted)
    code, out, _ = cli("doctor")
    assert code == 1
    assert "! no-such-package is missing: pip install 'no-such-package>=1.2'" in out
    assert "is too old: pip install 'numpy>=9999.1'" in out
    assert "pytest" not in out
