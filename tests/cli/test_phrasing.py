"""Values as a person reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from magi_agent.cli.phrasing import moment, parameters, safe, size, span, tokens


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (98_432_128, "98.4 MB"),
        (253_113_024, "253 MB"),
        (999_960_000, "1.0 GB"),
        (4_683_073_952, "4.7 GB"),
        (99_960_000_000, "100 GB"),
        (1e30, "1000000000000000 PB"),
        (None, "-"),
        (True, "-"),
        ("4 GB", "-"),
    ],
)
def test_sizes_are_in_decimal_units(value: object, said: str) -> None:
    assert size(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(7.0, "7B"), (0.6, "0.6B"), (0.135, "135M"), (30.5, "30.5B"), (0.0, "-"), (None, "-"), (671, "671B")],
)
def test_parameters_are_as_people_call_them(value: object, said: str) -> None:
    assert parameters(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(512, "512"), (8192, "8k"), (131072, "128k"), (1048576, "1M"), (40960, "40k"), (1536, "1.5k"), (None, "-")],
)
def test_context_lengths_are_short(value: object, said: str) -> None:
    assert tokens(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0s"), (42.9, "42s"), (185, "3m 05s"), (7800, "2h 10m"), (442_800, "5d 3h"), (-1, "-"), ("x", "-")],
)
def test_spans_have_two_units(value: object, said: str) -> None:
    assert span(value) == said


def test_moments_are_local_with_how_long_ago() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    then = (now - timedelta(minutes=2)).isoformat().replace("+00:00", "Z")

    assert moment(then, now).endswith(" (2m 00s ago)")
    assert moment((now + timedelta(hours=1)).isoformat(), now).endswith(" (0s ago)")
    assert moment("2026-01-02T03:04:05", now).endswith(" (0s ago)")
    assert moment(None) == "never"
    assert moment("yesterday\x1b") == "yesterday\\x1b"


def test_text_that_is_not_for_a_terminal_is_escaped() -> None:
    assert safe("a\x1b[31m\r\n\tb") == "a\\x1b[31m\\x0d\\x0a    b"
    assert safe("\x7f\x9b\u202e\ue0001") == "\\x7f\\x9b\\u202e\\ue0001"
    assert safe("\U000e0001\udcff") == "\\U000e0001\\xff"
    assert safe("schöne 模型 😀") == "schöne 模型 😀"
