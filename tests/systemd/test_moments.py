"""Points in time as people write them."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from magi_agent.systemd.moments import moment

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> object:
    """A host two hours east of Greenwich."""
    monkeypatch.setenv("TZ", "EAST-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def said(text: str) -> str:
    return datetime.fromtimestamp(moment(text, NOW), UTC).isoformat(" ").removesuffix("+00:00")


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-01-02T03:04:05Z", "2026-01-02 03:04:05"),
        ("2026-01-02T03:04:05.250+01:00", "2026-01-02 02:04:05.250000"),
        ("2026-01-02 03:04:05", "2026-01-02 01:04:05"),
        ("2026-01-02", "2026-01-01 22:00:00"),
        ("now", "2026-03-04 05:06:07"),
        ("today", "2026-03-03 22:00:00"),
        (" yesterday ", "2026-03-02 22:00:00"),
        ("-1h", "2026-03-04 04:06:07"),
        ("-1h 30min", "2026-03-04 03:36:07"),
        ("1.5h ago", "2026-03-04 03:36:07"),
        ("2 days 3 hours ago", "2026-03-02 02:06:07"),
        ("-1w", "2026-02-25 05:06:07"),
        ("@1767323045.5", "2026-01-02 03:04:05.500000"),
        ("-999999999y", "1970-01-01 00:00:00"),
        ("1969-01-01T00:00:00Z", "1970-01-01 00:00:00"),
    ],
)
def test_times(text: str, when: str) -> None:
    assert said(text) == when


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1h",
        "-",
        "-h",
        "-1",
        "ago",
        "-1 fortnight",
        "5 ago",
        "--help",
        "@",
        "@-1",
        "03:04",
        "2026-13-01",
        "-1h" * 40,
        "0001-01-01",
    ],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="must be a time, such as '2026-01-02T03:04:05Z', '-1h'"):
        moment(text, NOW)
