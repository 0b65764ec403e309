"""tersenet report"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.cli.console import examples, show, width
from tersenet.cli.options import JsonOption
from tersenet.errors import ArtifactError

if TYPE_CHECKING:
    from tersenet.results import Report

EXAMPLES = examples("tersenet report runs/digits", "tersenet report runs/digits --json")


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Write a run's report.html anew from its report.json, and print its table."""
    from tersenet.atomic import write_text
    from tersenet.report.html import render
    from tersenet.report.tables import render_text

    found = read(folder)
    page = folder / "report.html"
    write_text(page, render(found))
    show(found.model_dump(mode="json"), lambda: f"{render_text(found, width())}\n\n{page}", as_json)


def read(folder: Path) -> Report:
    """Raises: ArtifactError if there is no report, or one that can't be read."""
    from tersenet.results import Report

    path = folder / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        hint = "give the folder of a finished run, as `tersenet compress --out` made it"
        raise ArtifactError(f"{path} can't be read ({error.strerror}): {hint}") from error
    except ValueError as error:
        first = str(error).partition("\n")[0]
        raise ArtifactError(
            f"{path} is damaged or of another version of tersenet ({first}); run the same compress again"
        ) from error
