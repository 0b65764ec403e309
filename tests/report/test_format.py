from __future__ import annotations

import pytest

from tersenet.report import format as f


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (f.count(0), "0"),
        (f.count(9_610), "9,610"),
        (f.count(10_000), "10.0 k"),
        (f.count(853_018), "853.0 k"),
        (f.count(125_485_952), "125.49 M"),
        (f.count(3_857_973_248), "3.86 G"),
        (f.count(7_000_000_000_000_000), "7000.00 T"),
        (f.size(740), "740 B"),
        (f.size(3_423_000), "3.42 MB"),
        (f.milliseconds(0.4123), "0.412 ms"),
        (f.milliseconds(8.3099), "8.31 ms"),
        (f.milliseconds(21.44), "21.4 ms"),
        (f.milliseconds(1234.5), "1,234 ms"),
        (f.milliseconds(0.0), "0 ms"),
        (f.tick(0), "0"),
        (f.tick(1_000), "1 k"),
        (f.tick(1_500_000), "1.5 M"),
        (f.tick(1_000_000_000), "1 G"),
        (f.duration(0.62), "0.6 s"),
        (f.duration(59.6), "60 s"),
        (f.duration(200), "3 min 20 s"),
        (f.duration(7_500), "2 h 5 min"),
        (f.percent(0.9339), "93.39 %"),
        (f.interval(0.9288, 0.9386), "92.88 to 93.86 %"),
        (f.interval(None, 0.5), ""),
        (f.change(200, 99), "-50.5 %"),
        (f.change(100, 104), "+4.0 %"),
        (f.change(7, 7), "same"),
        (f.change(0, 7), ""),
        (f.points(0.9339, 0.9291), "-0.48 points"),
        (f.points(0.9, 0.90001), "same"),
        (f.speed(19.3, 10.0), "1.93x faster"),
        (f.speed(10.0, 11.0), "1.10x slower"),
        (f.speed(10.0, 10.01), "same"),
        (f.speed(0.0, 1.0), ""),
        (f.number(0.0638271), "0.06383"),
        (f.clean("a\x1b[31mb\n\ud800"), "a\N{REPLACEMENT CHARACTER}[31mb" + 2 * "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_figures(shown: str, text: str) -> None:
    assert shown == text
