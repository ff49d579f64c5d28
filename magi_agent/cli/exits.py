"""How ``magictl`` ends: its exit statuses, and the errors that carry them."""

from collections.abc import Mapping
from enum import IntEnum

from magi_agent.errors import MagiError


class Exit(IntEnum):
    """The exit statuses of ``magictl``; scripts rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4


class CommandError(MagiError):
    """The command could not do what it was asked. ``kind`` is the stable word in JSON output."""

    exit_status: Exit = Exit.FAILED

    def __init__(self, kind: str, message: str, details: Mapping[str, object] | None = None) -> None:
        super().__init__(message, details)
        self.kind = kind


class UnreachableError(CommandError):
    """Nothing answered where the agent should be, or not in time."""

    exit_status = Exit.UNREACHABLE

    def __init__(self, message: str, details: Mapping[str, object] | None = None) -> None:
        super().__init__("AgentUnreachable", message, details)


class RefusedError(CommandError):
    """The agent answered with an error. ``kind`` is its ``error`` word, ``http_status`` its HTTP status."""

    def __init__(
        self, http_status: int, kind: str, message: str, details: Mapping[str, object], request_id: str | None = None
    ) -> None:
        super().__init__(kind, message, details)
        self.http_status = http_status
        self.request_id = request_id


class OutputError(Exception):
    """What was to be said could not be written; no command can do anything about it."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"cannot write the output: {cause.strerror}")
        self.nobody_reads = isinstance(cause, BrokenPipeError)
        """Whether the reader of a pipe has had enough, which is no failure that needs telling."""


class UnknownNameError(RefusedError):
    """No model, or no profile, has the name that was given."""

    exit_status = Exit.NOT_FOUND
