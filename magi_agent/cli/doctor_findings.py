"""What ``magictl doctor`` finds: one line each."""

from dataclasses import dataclass
from enum import StrEnum


class Result(StrEnum):
    """How a finding is to be taken; the value is the word in JSON."""

    OK = "ok"
    WARNING = "warning"
    """Things work, but not as well as they could, or not all of them."""
    FAILED = "failed"
    UNKNOWN = "unknown"
    """It could not be looked at by whoever called."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    result: Result
    found: str
    mend: str | None = None
    """The command that mends it, or what to do where no single command does."""


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(Result.OK, found)


def warning(found: str, mend: str | None = None) -> Finding:
    """It should be known."""
    return Finding(Result.WARNING, found, mend)


def failed(found: str, mend: str | None = None) -> Finding:
    """It is wrong."""
    return Finding(Result.FAILED, found, mend)


def unknown(found: str, mend: str | None = None) -> Finding:
    """It could not be looked at."""
    return Finding(Result.UNKNOWN, found, mend)
