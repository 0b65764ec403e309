"""A budget as users write it: `macs=50%`, `params=0.3M`, `macs=40M`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from tersenet.errors import TersenetError

_FORM = re.compile(r"^\s*(?P<kind>macs|params)\s*=\s*(?P<number>\d+(?:\.\d+)?(?:[eE]\d+)?)\s*(?P<unit>%|[kMG])?\s*$")
_UNITS = {None: 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Target:
    """At most `value` MACs or parameters; a fraction of the original network's where `relative`."""

    kind: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises: TersenetError for any other form, and for nothing or more than everything."""
        found = _FORM.match(text)
        if found is None:
            raise TersenetError(
                f"target {text!r} is not understood: write macs=50% or params=40% of the original, "
                "or an absolute macs=40M, params=300k"
            )
        relative = found["unit"] == "%"
        value = float(found["number"]) * (0.01 if relative else _UNITS[found["unit"]])
        if value <= 0 or (relative and value > 1):
            raise TersenetError(f"target {text!r} must be above 0" + (" and at most 100%" if relative else ""))
        return cls(found["kind"], value, relative)

    def limit(self, original: int) -> int:
        """The largest count that meets the target, for a network that has `original`."""
        return int(original * self.value + 1e-6) if self.relative else int(self.value)


def _understood(text: str) -> str:
    try:
        Target.parse(text)
    except TersenetError as error:
        raise ValueError(str(error)) from None
    return text


TargetText = Annotated[str, AfterValidator(_understood)]
"""A setting that holds a budget as it was written."""
