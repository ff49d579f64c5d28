"""Points in time as people write them: ISO 8601, and of systemd.time(7) what is before now."""

import re
from datetime import datetime, timedelta
from typing import Final

_DAY: Final = 86_400.0
_SECONDS: Final = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), _DAY),
    **dict.fromkeys(("w", "week", "weeks"), 7 * _DAY),
    **dict.fromkeys(("M", "month", "months"), 30.44 * _DAY),
    **dict.fromkeys(("y", "year", "years"), 365.25 * _DAY),
}
"""How long each unit of systemd.time(7) is, by its spellings."""
_PART: Final = r"(\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z]+)"
_SPAN: Final = re.compile(rf"(?:{_PART}\s*)+")
_EPOCH: Final = re.compile(r"@(\d{1,11}(?:\.\d{1,6})?)")
_LONGEST: Final = 64
_ALLOWED: Final = "must be a time, such as '2026-01-02T03:04:05Z', '-1h', '10 min ago' or 'yesterday'"


def moment(text: str, now: float) -> float:
    """The point in time that ``text`` names, in seconds since the epoch, as ``now`` is.

    ``2026-01-02T03:04:05Z`` and all of ISO 8601, also with a space for the ``T``; ``-1h``, ``1h 30min ago``; ``now``,
    ``today``, ``yesterday``; ``@`` and seconds since the epoch. What names no zone is in the host's own. Raises
    ``ValueError`` with what is allowed.
    """
    word = text.strip()
    today = datetime.fromtimestamp(now)  # noqa: DTZ006  # midnight is the host's own
    midnight = today.replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        match word:
            case _ if len(word) > _LONGEST:
                raise ValueError(word)
            case "now":
                return now
            case "today":
                return midnight.timestamp()
            case "yesterday":
                return (midnight - timedelta(days=1)).timestamp()
            case _:
                pass
        if epoch := _EPOCH.fullmatch(word):
            return float(epoch[1])
        if (seconds := _span_before(word)) is not None:
            return max(0.0, now - seconds)
        return max(0.0, datetime.fromisoformat(word).timestamp())
    except (ValueError, OverflowError):
        raise ValueError(_ALLOWED) from None


def _span_before(word: str) -> float | None:
    """The seconds of ``-1h`` and ``1h ago``; ``None`` for what is no such span."""
    if word.startswith("-"):
        span = word[1:].strip()
    elif word.endswith(" ago"):
        span = word.removesuffix(" ago").strip()
    else:
        return None
    if not _SPAN.fullmatch(span):
        return None
    parts = re.findall(_PART, span)
    if any(unit not in _SECONDS for _, unit in parts):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
