"""How values are put for a person to read: sizes, spans of time, and text that is safe for a terminal.

What comes from the agent is JSON of any age, so each function takes any value and never fails.
"""

import re
from datetime import UTC, datetime

NOTHING = "-"
"""Stands where there is no value."""

_HUMP = re.compile(r"(?<=[a-z0-9])([A-Z])")
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def safe(value: object) -> str:
    """Return ``value`` as one line of text that moves no cursor and changes no colour.

    File names and log lines are other people's: control characters and lone surrogates are shown as escapes.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character == "\t":
        return "    "
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte of a file name that is not UTF-8 (PEP 383)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def snake_case(key: str) -> str:
    """Return a camelCase key of the API's as it stands in files, which is how people type it."""
    return _HUMP.sub(r"_\1", key).lower()


def number(value: object) -> float | None:
    """Return ``value`` where it is a number, else ``None``; a JSON boolean is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def size(value: object) -> str:
    """Return a number of bytes in decimal units, as disks and model hubs count: ``4.7 GB``."""
    count = number(value)
    if count is None:
        return NOTHING
    for unit in _UNITS:
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return NOTHING


def parameters(value: object) -> str:
    """Return a number of billions as people write it: ``7B``, ``0.6B``, ``135M``."""
    billions = number(value)
    if billions is None or billions <= 0:
        return NOTHING
    if billions < 0.5:
        return f"{billions * 1000:.0f}M"
    return f"{round(billions, 1):g}B"


def tokens(value: object) -> str:
    """Return a context length in short: ``8k``, ``128k``, ``1M``."""
    count = number(value)
    if count is None:
        return NOTHING
    for step, unit in ((1024 * 1024, "M"), (1024, "k")):
        if count >= step:
            return f"{round(count / step, 1 if count < 10 * step else 0):g}{unit}"
    return f"{count:.0f}"


def span(value: object) -> str:
    """Return a number of seconds with its two largest units: ``42s``, ``3m 05s``, ``2h 10m``, ``5d 3h``."""
    seconds = number(value)
    if seconds is None or seconds < 0:
        return NOTHING
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    if minutes:
        return f"{minutes}m {whole % 60:02}s"
    return f"{whole}s"


def seconds_taken(value: float) -> str:
    """Return how long something took: tenths below a minute, where they matter."""
    return f"{value:.1f} s" if value < 60 else span(value)


def moment(value: object, now: datetime | None = None) -> str:
    """Return an ISO 8601 time of the agent's in local time, with how long ago it was."""
    if not isinstance(value, str):
        return "never"
    try:
        then = datetime.fromisoformat(value)
    except ValueError:
        return safe(value)
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    ago = ((now or datetime.now(UTC)) - then).total_seconds()
    local = then.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{local} ({span(max(ago, 0.0))} ago)"


def local_time(value: object) -> str:
    """Return an ISO 8601 time of the agent's in local time, to the second."""
    try:
        return datetime.fromisoformat(str(value)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return safe(value)


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return ``count`` with its noun: ``1 model``, ``2 models``."""
    return f"{count} {one if count == 1 else many or one + 's'}"
