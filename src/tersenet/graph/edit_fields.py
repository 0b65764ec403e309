"""What the fields of edits are read with: names, sizes, indices and orders out of a file of anybody's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo

_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", re.ASCII)
_NUMBERS = re.compile(r"\d{1,8}(,\d{1,8})*", re.ASCII)
MAX_INDEX = 10_000_000
Name = Annotated[str, Field(max_length=512, pattern=r"^[A-Za-z0-9_.\-]*$")]
Size = Annotated[int, Field(ge=0, le=MAX_INDEX)]


class EditModel(BaseModel):
    """The base of edits and of their parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass
class Budget:
    """How many numbers a file may still stand for: `0-9999999` is short, a thousand of them exhaust memory.

    It is the validation context of whatever reads edits from a file. Large networks need some millions.
    """

    left: int = 20_000_000

    def take(self, count: int) -> None:
        if count > self.left:
            raise ValueError("the file stands for more indices than any network has")
        self.left -= count


def parse_indices(value: object, budget: Budget | None = None) -> tuple[int, ...]:
    """`"0-3,7"` or any sequence of increasing integers."""
    if isinstance(value, str):
        if not _RANGES.fullmatch(value):
            raise ValueError(f"indices must look like 0-3,7 (got {value[:40]!r})")
        indices: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            start, stop = int(first), int(last or first) + 1
            if stop > MAX_INDEX or stop <= start or (indices and start <= indices[-1]):
                raise ValueError(f"indices {part!r} are out of range or out of order")
            if budget is not None:
                budget.take(stop - start)
            indices.extend(range(start, stop))
        return tuple(indices)
    array = _integers(value, "indices must be integers")
    if (np.diff(array) <= 0).any() or (array[:1] < 0).any():
        raise ValueError("indices must be increasing and not negative")
    if budget is not None:
        budget.take(len(array))
    return tuple(array.tolist())


def _integers(value: object, rule: str) -> NDArray[np.int64]:
    """(n,). Raises: ValueError for anything but integers: 0.5 is not rounded."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{rule} ({error})") from None
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{rule} (got {str(value)[:40]})")
    return array.astype(np.int64).reshape(-1)


def budget_of(info: ValidationInfo) -> Budget | None:
    """That of the file which is being read, if it is one."""
    return info.context if isinstance(info.context, Budget) else None


def _read_indices(value: object, info: ValidationInfo) -> tuple[int, ...]:
    return parse_indices(value, budget_of(info))


def format_indices(indices: tuple[int, ...]) -> str:
    """The inverse of `parse_indices`: runs as `first-last`."""
    if not indices:
        return ""
    array = np.asarray(indices)
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


Indices = Annotated[tuple[int, ...], BeforeValidator(_read_indices), PlainSerializer(format_indices)]


def _read_order(value: object, info: ValidationInfo) -> tuple[int, ...]:
    """`"2,0,1"` or any sequence that holds each number below its length once."""
    if isinstance(value, str):
        if not _NUMBERS.fullmatch(value):
            raise ValueError(f"an order of channels must look like 2,0,1 (got {value[:40]!r})")
        value = [int(number) for number in value.split(",")]
    array = _integers(value, "an order of channels must be of integers")
    if len(array) == 0 or not np.array_equal(np.sort(array), np.arange(len(array))):
        raise ValueError("an order of channels must hold each number below its length once")
    budget = budget_of(info)
    if budget is not None:
        budget.take(len(array))
    return tuple(array.tolist())


def _format_order(order: tuple[int, ...]) -> str:
    return ",".join(map(str, order))


Order = Annotated[tuple[int, ...], BeforeValidator(_read_order), PlainSerializer(_format_order)]
