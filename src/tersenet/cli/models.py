"""tersenet models"""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer

from tersenet.cli.console import columns, examples, show
from tersenet.cli.options import JsonOption
from tersenet.models.registry import ENTRIES, PUBLISHED, Entry, Published, in_zoo

EXAMPLES = examples("tersenet models", "tersenet models 'vgg*' --json", "tersenet models 'timm:resnet*'")

_ZOO = """\
Any network of timm and torchvision too, as timm:NAME and torchvision:NAME (pip install 'tersenet[zoo]'):
`tersenet models 'timm:*'` lists them."""


def models(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Only these: 'vgg*', 'timm:resnet*'.", show_default=False)
    ] = "*",
    as_json: JsonOption = False,
) -> None:
    """List the built-in models and the published weight files that are recognised, or timm's or torchvision's names."""
    if in_zoo(pattern):
        # Importing the library takes seconds, and torch.
        from tersenet.models.zoo import names

        found = [name for name in names(pattern.partition(":")[0]) if fnmatchcase(name, pattern)]
        show({"models": [{"name": name} for name in found]}, lambda: "\n".join(found), as_json)
        return
    entries = [entry for entry in ENTRIES.values() if fnmatchcase(entry.name, pattern)]
    weights = [known for known in PUBLISHED if fnmatchcase(known.model, pattern)]
    document: dict[str, Any] = {"models": [asdict(e) for e in entries], "weights": [asdict(p) for p in weights]}
    show(document, lambda: _text(entries, weights), as_json)


def _text(entries: list[Entry], weights: list[Published]) -> str:
    table = columns(("MODEL", "INPUT", "CLASSES", "FAMILY"), map(_row, entries))
    known = columns(
        ("WEIGHTS", "MODEL", "TOP-1", "FROM"),
        ((p.file, p.model, f"{p.top1:.2%}", p.source) for p in weights),
    )
    return f"{table}\n\n{_ZOO}\n\nPublished weights, recognised by their checksum (--weights FILE):\n{known}"


def _row(entry: Entry) -> tuple[str, str, str, str]:
    return entry.name, "x".join(map(str, entry.input_shape)), str(entry.classes), entry.family
