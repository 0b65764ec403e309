"""The command `tersenet`: one file per command, and here what they all share."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Annotated

import typer

from tersenet.cli import (
    bench,
    compress,
    console,
    data,
    doctor,
    evaluate,
    export,
    measure,
    models,
    recipe,
    report,
    search,
    sensitivity,
    train,
    winograd,
)
from tersenet.cli.console import note
from tersenet.errors import TersenetError

app = typer.Typer(
    name="tersenet",
    help="Make a PyTorch CNN smaller and measurably faster, with its accuracy known.",
    epilog="Start with:  tersenet compress resnet8 --recipe sfp_digits --data digits",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=compress.EXAMPLES)(compress.compress)
app.command(epilog=train.EXAMPLES)(train.train)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=measure.EXAMPLES)(measure.measure)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=sensitivity.EXAMPLES)(sensitivity.sensitivity)
app.command(epilog=search.EXAMPLES)(search.search)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=report.EXAMPLES)(report.report)
app.add_typer(recipe.app, name="recipe")
app.command(epilog=models.EXAMPLES)(models.models)
app.add_typer(data.app, name="data")
app.add_typer(winograd.app, name="winograd")
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tersenet {version('tersenet')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit.

    Codes: 0 done, 1 what was asked for can't be done, 2 the command line is not understood, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    console.command = ["tersenet", *arguments]
    pressed = _note_interrupts()
    try:
        code = app(arguments or ["--help"], prog_name="tersenet", standalone_mode=False)
        sys.stdout.flush()
    except TersenetError as error:
        note(f"error: {error}")
        code = 1
    except typer.TyperException as error:
        code = _usage(error)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        note(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        code = 1
    except Exception:
        # A library that is interrupted while it is imported may fail in its own way.
        if not pressed:
            raise
        code = 130
    if code == 130:
        note("interrupted")
    raise SystemExit(code or 0)


def _note_interrupts() -> list[int]:
    """A list that Ctrl-C puts its signal into, beside what Python does; not where somebody else handles it."""
    pressed: list[int] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    return pressed


def _usage(error: typer.TyperException) -> int:
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else "tersenet"
    note(f"error: {error.format_message()}\nSee `{command} --help`.")
    return error.exit_code
