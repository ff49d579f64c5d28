"""What goes over the wire of logs and histories."""

import time
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from magi_agent.api.schemas import Answer
from magi_agent.servers.history import Happened
from magi_agent.servers.server_log import Excerpt, Run, is_run
from magi_agent.systemd.journal import is_cursor
from magi_agent.systemd.moments import moment

MOST_LINES: Final = 10_000
USUAL_LINES: Final = 100
MOST_EVENTS: Final = 1000
USUAL_EVENTS: Final = 100
PRIORITIES: Final = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
"""syslog(3)'s, by their numbers."""
_ALIASES: Final = {"error": "err", "warn": "warning", "panic": "emerg"}


def _priority(value: object) -> object:
    word = str(value).lower()
    word = _ALIASES.get(word, word)
    if word in PRIORITIES:
        return PRIORITIES.index(word)
    if word in {str(number) for number in range(len(PRIORITIES))}:
        return int(word)
    raise PydanticCustomError("priority", f"must be one of {', '.join(PRIORITIES)}, or its number, 0 to 7")


def _time(value: object) -> object:
    try:
        return moment(str(value), time.time())
    except ValueError as error:
        raise PydanticCustomError("time", "{said}", {"said": str(error)}) from None


def _cursor(value: object) -> object:
    if not is_cursor(str(value)):
        raise PydanticCustomError("cursor", "must be a cursor as an answer of this path has it")
    return value


def _run(value: object) -> object:
    if not is_run(str(value)):
        raise PydanticCustomError("run", f"must be one of {', '.join(Run)}, or the id of a run, 32 hexadecimal digits")
    return value


def _flag(value: object) -> object:
    word = str(value).lower()
    if word not in ("true", "false", "1", "0", ""):
        raise PydanticCustomError("flag", "must be true or false")
    return word in ("true", "1", "")


Cursor = Annotated[str, BeforeValidator(_cursor)]
Moment = Annotated[float, BeforeValidator(_time)]


class LogQuery(BaseModel):
    """Which part of a server's log is wanted, in the words of the query string."""

    model_config = ConfigDict(defer_build=True, alias_generator=to_camel, frozen=True, extra="ignore")

    lines: int = Field(USUAL_LINES, ge=0, le=MOST_LINES)
    since: Moment | None = None
    until: Moment | None = None
    priority: Annotated[int, BeforeValidator(_priority)] | None = None
    run: Annotated[str, BeforeValidator(_run)] = Run.ALL
    cursor: Cursor | None = None
    before: Cursor | None = None
    follow: Annotated[bool, BeforeValidator(_flag)] = False

    @model_validator(mode="after")
    def _together(self) -> "LogQuery":
        if self.cursor is not None and self.before is not None:
            raise PydanticCustomError("together", "cursor and before are two places to begin at: give one of them")
        if self.since is not None and self.until is not None and self.since > self.until:
            raise PydanticCustomError("together", "since must not be later than until")
        if self.follow and (self.until is not None or self.before is not None):
            raise PydanticCustomError("together", "follow goes on with what is yet to come: leave until and before out")
        return self

    @property
    def excerpt(self) -> Excerpt:
        """The same, for the service."""
        return Excerpt(run=self.run, since=self.since, until=self.until, priority=self.priority)


class HistoryQuery(BaseModel):
    """How much of a history is wanted."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="ignore")

    limit: int = Field(USUAL_EVENTS, ge=1, le=MOST_EVENTS)


class LogEntryAnswer(Answer):
    """One line of a server's log."""

    at: datetime = Field(description="when journald received it")
    message: str = Field(description="bytes that are not UTF-8 are replaced")
    priority: int | None = Field(description="syslog(3): 3 an error, 6 information, 7 debugging")
    pid: int | None
    invocation_id: str | None = Field(description="the run that it belongs to, where that is known")
    source: Literal["server", "systemd"] = Field(description="who says it: the server itself, or systemd of it")
    cursor: str = Field(description="where it stands")


class LogAnswer(Answer):
    """A part of a server's log, oldest entry first."""

    model_id: str
    entries: list[LogEntryAnswer]
    cursor: str | None = Field(description="where the last entry stands: `cursor` of the question for what comes next")
    truncated: bool = Field(
        description="whether there is more: older entries where the newest were asked for, newer ones after `cursor`"
    )


class HistoryEventAnswer(Answer):
    """One thing that happened to a model's server."""

    at: datetime
    event: Happened
    message: str
    by: str | None = Field(description="who asked for it, `systemd` and `agent` included; null where nobody knows")
    result: str | None = Field(description="systemd's result of the run, or the agent's own word")
    exit_status: int | None
    signal: str | None
    invocation_id: str | None = Field(description="the run: `run` of the question for its log")
    forced: bool | None = Field(
        description="of a start, whether it was forced: made also where it does not fit; null where nobody tells"
    )


class HistoryAnswer(Answer):
    """What happened to a model's server, oldest event first."""

    model_id: str
    events: list[HistoryEventAnswer]
    truncated: bool = Field(description="whether there were earlier events in the journal")


def in_query(model: type[BaseModel], query: Any) -> dict[str, str]:
    """The keys of a query string that a model knows; of one that stands twice the first counts."""
    return {name: query[name] for name in (to_camel(field) for field in model.model_fields) if name in query}
