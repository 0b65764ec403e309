"""tersenet models"""

from __future__ import annotations

from dataclasses import asdict

from tersenet.cli.console import columns, examples, show
from tersenet.cli.options import JsonOption
from tersenet.models.registry import ENTRIES, PUBLISHED, Entry

EXAMPLES = examples("tersenet models", "tersenet models --json")


def models(as_json: JsonOption = False) -> None:
    """List the built-in models, and the published weight files that are recognised."""
    document = {"models": [asdict(entry) for entry in ENTRIES.values()], "weights": [asdict(p) for p in PUBLISHED]}
    show(document, _text, as_json)


def _text() -> str:
    table = columns(("MODEL", "INPUT", "CLASSES", "FAMILY"), map(_row, ENTRIES.values()))
    known = columns(
        ("WEIGHTS", "MODEL", "TOP-1", "FROM"),
        ((p.file, p.model, f"{p.top1:.2%}", p.source) for p in PUBLISHED),
    )
    return f"{table}\n\nPublished weights, recognised by their checksum (--weights FILE):\n{known}"


def _row(entry: Entry) -> tuple[str, str, str, str]:
    return entry.name, "x".join(map(str, entry.input_shape)), str(entry.classes), entry.family
