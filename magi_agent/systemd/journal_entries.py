"""One entry of the journal, from a line of ``journalctl --output=json``.

Fields: systemd.journal-fields(7); the form: journalctl(1) and systemd's JOURNAL_EXPORT_FORMATS.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

INVOCATION: Final = "_SYSTEMD_INVOCATION_ID"
FIELDS: Final = ("MESSAGE", "PRIORITY", "_PID", INVOCATION)
"""Those that every entry is read with."""
_CURSOR: Final = "__CURSOR"
_TIME: Final = "__REALTIME_TIMESTAMP"
_NAMED: Final = frozenset({*FIELDS, _CURSOR, _TIME, "__MONOTONIC_TIMESTAMP", "_BOOT_ID"})


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One entry of the journal."""

    message: str
    timestamp: float
    """When journald received it, in seconds since the epoch (UTC)."""
    priority: int | None
    """syslog(3): 0 is an emergency, 3 an error, 6 information, 7 debugging."""
    pid: int | None
    invocation_id: str
    """The run of the unit that wrote it; empty where journald came too late to find out."""
    cursor: str = ""
    """Where it stands: what comes after it, or stands before it, can be asked for by this."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """The other fields that were asked for, those that the entry has."""


def entry_of(line: bytes, longest_message: int) -> JournalEntry | None:
    """The entry in one line, its message cut to so many characters; ``None`` for a line that is no entry."""
    try:
        fields = json.loads(line)
        timestamp = int(fields[_TIME]) / 1_000_000
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return JournalEntry(
        message=_text(fields.get("MESSAGE"))[:longest_message],
        timestamp=timestamp,
        priority=_number(fields.get("PRIORITY")),
        pid=_number(fields.get("_PID")),
        invocation_id=_text(fields.get(INVOCATION)),
        cursor=_text(fields.get(_CURSOR)),
        fields={name: _text(value) for name, value in fields.items() if name not in _NAMED},
    )


def _text(value: object) -> str:
    """Return a field's value: a string, or an array of bytes where it is not UTF-8; the first where there are more."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return ""
    if all(isinstance(item, int) for item in value):
        return bytes(value).decode(errors="replace")
    return _text(value[0])


def _number(value: object) -> int | None:
    text = _text(value)
    return int(text) if text.isdecimal() and len(text) < _LONGEST_NUMBER else None


_LONGEST_NUMBER: Final = 20
