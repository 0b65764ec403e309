"""tersenet winograd info"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Cli = Callable[..., tuple[int, str, str]]


def test_info_as_text(cli: Cli) -> None:
    code, out, err = cli("winograd", "info", "F4")
    assert (code, err) == (0, "")
    assert out.startswith("F(4x4, 3x3), tile 6, points 0, 1, -1, 1/2, -2 and infinity")
    assert "-16/15  -8/15  -4/15" in out
    assert "2.25 per output, direct 9 (4 times as many)" in out


def test_info_as_json(cli: Cli) -> None:
    found = json.loads(cli("winograd", "info", "F(4x4, 5x5)", "--points", "lavin", "--bits", "10", "--json")[1])
    assert (found["m"], found["r"], found["tile"]) == (4, 5, 8)
    assert found["points"] == ["0", "1", "-1", "2", "-2", "1/2", "-1/2", "inf"]
    assert found["multiplications_per_output"] == 4
    errors = found["relative_error"]
    assert 0 < errors["float32"] < 1e-5 < errors["10_bits_per_tap"] < errors["10_bits_per_tensor"]


def test_own_points(cli: Cli) -> None:
    found = json.loads(cli("winograd", "info", "F2", "--points", "0,1/2,-1/2", "--json")[1])
    assert found["points"] == ["0", "1/2", "-1/2", "inf"]
    assert found["relative_error"]["float32"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("G4",), "G4 must be F4, which is F(4x4, 3x3)"),
        (("F(4x5)",), "F(4x5) must be F4"),
        (("F0",), "m and r must be at least 1"),
        (("F15",), "the tile m + r - 1 at most 16"),
        (("F2", "--points", "0,1"), "F(2, 3) needs 3 different points beside infinity, not 0, 1"),
        (("F2", "--points", "lavi"), "did you mean 'lavin'?"),
    ],
)
def test_errors(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = cli("winograd", "info", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_help(cli: Cli) -> None:
    code, out, _ = cli("winograd", "info", "--help")
    assert code == 0
    assert "--json" in out
    assert "tersenet winograd info" in out.partition("Examples")[2]
