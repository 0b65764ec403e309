"""Small constant matrices applied to vectors, in as few instructions as their symmetry allows."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tersenet.kernels.ir import Function

Rows = Sequence[Sequence[Fraction]]


def apply(f: Function, matrix: Rows, inputs: Sequence[str]) -> list[str]:
    """Instructions for `matrix` times `inputs`: one register for each row.

    The points p and -p give pairs of columns of A^T, and of rows of B^T, that differ only in signs: their sums and
    differences are shared.
    """
    columns, values = _column_pairs(f, matrix, list(inputs))
    rows = list(zip(*columns, strict=True))
    results: dict[int, str] = {}
    for i, row in enumerate(rows):
        partner = next((k for k in range(i + 1, len(rows)) if k not in results and _mirrored(row, rows[k])), None)
        if i in results or partner is None:
            continue
        same = [a == b for a, b in zip(row, rows[partner], strict=True)]
        even = combine(f, [a if s else Fraction() for a, s in zip(row, same, strict=True)], values)
        factors = [Fraction() if s else a for a, s in zip(row, same, strict=True)]
        # Half of it or twice as much has a plain term to start with, and the factor costs nothing in the sum.
        factor = Fraction(1) if 1 in factors else next(filter(None, factors))
        odd = combine(f, [a / factor for a in factors], values)
        results[i], results[partner] = _plus(f, even, factor, odd), _plus(f, even, -factor, odd)
    return [results[i] if i in results else combine(f, row, values) for i, row in enumerate(rows)]


def combine(f: Function, factors: Sequence[Fraction], inputs: Sequence[str]) -> str:
    """The sum of `inputs` times `factors`."""
    # A plain term first: it costs nothing to start with.
    terms = sorted(((a, x) for a, x in zip(factors, inputs, strict=True) if a), key=lambda term: term[0] != 1)
    (first, total), *rest = terms
    if first != 1:
        total = f.vmul(f.splat(first), total)
    for a, x in rest:
        total = _plus(f, total, a, x)
    return total


def _plus(f: Function, total: str, a: Fraction, x: str) -> str:
    """`total` + a x."""
    if abs(a) == 1:
        return f.vadd(total, x) if a == 1 else f.vsub(total, x)
    return f.vmuladd(f.splat(a), x, total)


def _mirrored(a: Sequence[Fraction], b: Sequence[Fraction]) -> bool:
    """Whether two rows differ only in signs, and have both equal and opposite entries."""
    return (
        all(abs(x) == abs(y) for x, y in zip(a, b, strict=True))
        and any(x and x == y for x, y in zip(a, b, strict=True))
        and any(x and x == -y for x, y in zip(a, b, strict=True))
    )


def _column_pairs(f: Function, matrix: Rows, values: list[str]) -> tuple[list[Sequence[Fraction]], list[str]]:
    """Columns and inputs of the same map, with the sum and difference in place of two columns that are mirrored."""
    columns: list[Sequence[Fraction]] = list(zip(*matrix, strict=True))
    done: set[int] = set()
    for i, a in enumerate(list(columns)):
        k = next((k for k in range(i + 1, len(columns)) if k not in done and _mirrored(a, columns[k])), None)
        # With few rows the sum and the difference cost as much as they save.
        if i in done or k is None or sum(map(bool, a)) < 3:
            continue
        done |= {i, k}
        b = columns[k]
        total, difference = f.vadd(values[i], values[k]), f.vsub(values[i], values[k])
        columns[i] = [x if x == y else Fraction() for x, y in zip(a, b, strict=True)]
        columns[k] = [Fraction() if x == y else x for x, y in zip(a, b, strict=True)]
        values[i], values[k] = total, difference
    return columns, values
