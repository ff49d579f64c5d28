"""What a model's server printed, and what systemd and journald said of its unit, from the journal.

The journal is where it lives: of servers that an earlier agent started too, and of runs that have ended.
"""

import contextlib
import os
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from magi_agent.servers.launch import unit_name
from magi_agent.systemd.journal import Journal, Selection
from magi_agent.systemd.journal_entries import INVOCATION, JournalEntry
from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import Scope

_SUFFIX: Final = ".service"
_ROOT: Final = "_UID=0"
_INVOCATION_ID: Final = re.compile(r"[0-9a-f]{32}")
_LOOKED_THROUGH: Final = 1000
"""Entries in which another run is looked for."""
_SYSTEM_UNIT: Final = "_SYSTEMD_UNIT"
_LEVEL: Final = re.compile(r"\d+\.\d\d\.\d{3}\.\d{3} ([EWD]) ")
"""How a line of llama-server's begins that is no information: the time since its start and a letter (common/log.cpp).

To journald all its lines are information.
"""
_PRIORITIES: Final = {"E": 3, "W": 4, "D": 7}
_INFORMATION: Final = 6


@dataclass(frozen=True, slots=True)
class _Names:
    """What fields that name a unit are called, which differs for a user's manager."""

    writer: str
    """The unit that wrote the entry, by journald's word."""
    subject: str
    """The unit that the manager speaks of."""
    run: str
    """Which run of it."""
    cause: str
    """The unit that is the reason for an entry of journald's own, or of another part of systemd."""


_NAMES: Final = {
    Scope.SYSTEM: _Names(_SYSTEM_UNIT, "UNIT", "INVOCATION_ID", "OBJECT_SYSTEMD_UNIT"),
    Scope.USER: _Names("_SYSTEMD_USER_UNIT", "USER_UNIT", "USER_INVOCATION_ID", "OBJECT_SYSTEMD_USER_UNIT"),
}


class Run(StrEnum):
    """Runs of a server that have a name; all others go by their invocation id."""

    ALL = "all"
    CURRENT = "current"
    """The one that is under way, else the last one."""
    PREVIOUS = "previous"
    """The one before it."""


def is_run(word: str) -> bool:
    """Whether a run can be named so."""
    return word in set(Run) or _INVOCATION_ID.fullmatch(word) is not None


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of a server's log."""

    at: datetime
    message: str
    priority: int | None
    """syslog(3): 0 is an emergency, 3 an error, 6 information, 7 debugging. By its own line, where that says it."""
    pid: int | None
    invocation_id: str | None
    cursor: str
    is_systemds: bool
    """Whether systemd or journald says it of the server, not the server itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """Which part of a log is wanted."""

    run: str = Run.ALL
    """A ``Run``, or an invocation id."""
    since: float | None = None
    """The oldest time, in seconds since the epoch."""
    until: float | None = None
    """Likewise the newest."""
    priority: int | None = None
    """The least important that counts."""

    def counts(self, entry: LogEntry) -> bool:
        """Whether an entry is important enough."""
        return self.priority is None or entry.priority is None or entry.priority <= self.priority


class ServerLogs:
    """The logs of all models' servers; which entries are important enough is for the reader to say (``counts``)."""

    def __init__(self, journal: Journal, manager: SystemdManager) -> None:
        self._journal = journal
        self._manager = manager
        self._names = _NAMES[manager.scope]
        self._own = f"_UID={os.getuid()}"

    async def newest(
        self, model_id: str, wanted: Excerpt, *, before: str | None = None
    ) -> AsyncGenerator[LogEntry, None]:
        """A log's entries from the newest on, or from the one on before a cursor. Raises ``JournalError``."""
        selection = await self._selection(model_id, wanted)
        if selection is None:
            return
        async with contextlib.aclosing(self._journal.newest(selection, before=before)) as entries:
            async for entry in entries:
                if found := self._log_entry(model_id, entry):
                    yield found

    async def after(self, model_id: str, wanted: Excerpt, cursor: str) -> AsyncGenerator[LogEntry, None]:
        """A log's entries that come after a cursor, the oldest first. Raises ``JournalError``."""
        selection = await self._selection(model_id, wanted)
        if selection is None:
            return
        async with contextlib.aclosing(self._journal.oldest(selection, after=cursor)) as entries:
            async for entry in entries:
                if found := self._log_entry(model_id, entry):
                    yield found

    async def follow(self, model_id: str, wanted: Excerpt, cursor: str) -> AsyncGenerator[LogEntry, None]:
        """A log's entries that come after a cursor, as they come; times count for nothing.

        Raises ``JournalError``, also where too many follow already.
        """
        selection = await self._selection(model_id, wanted)
        if selection is None:
            return
        async with contextlib.aclosing(self._journal.follow(selection, cursor)) as entries:
            async for entry in entries:
                if found := self._log_entry(model_id, entry):
                    yield found

    def refuse_where_full(self) -> None:
        """Raise ``JournalError`` where nobody else can follow a log now."""
        self._journal.refuse_where_full()

    async def end(self) -> str:
        """The cursor of the last entry that there is of anybody.

        Raises ``JournalError`` where the journal may not be read, so that an empty log says nothing.
        """
        return await self._journal.end(of_others=self._manager.scope is Scope.SYSTEM)

    async def _selection(self, model_id: str, wanted: Excerpt) -> Selection | None:
        """What to look for; ``None`` where there is no such run."""
        run: str | None = wanted.run
        match wanted.run:
            case Run.ALL:
                return self._all_runs(model_id, wanted)
            case Run.CURRENT:
                run = await self._current_run(model_id)
            case Run.PREVIOUS:
                run = await self._run_before(model_id, await self._current_run(model_id))
            case _:
                pass
        return self._one_run(model_id, wanted, run) if run else None

    def _all_runs(self, model_id: str, wanted: Excerpt) -> Selection:
        unit, names = unit_name(model_id), self._names
        if self._manager.scope is Scope.SYSTEM:
            any_of = [
                [f"{names.writer}={unit}"],
                [f"{names.subject}={unit}", "_PID=1"],
                [f"{names.cause}={unit}", _ROOT],
            ]
        else:
            any_of = [
                [f"{names.writer}={unit}", self._own],
                [f"{names.subject}={unit}", self._own],
                [f"{names.cause}={unit}", f"OBJECT{self._own}", _ROOT],
                # Of a process that was gone before journald has looked who it is, there is nothing but its own word.
                [f"SYSLOG_IDENTIFIER={unit.removesuffix(_SUFFIX)}", self._own],
            ]
        return self._selected(wanted, any_of)

    def _one_run(self, model_id: str, wanted: Excerpt, run: str) -> Selection:
        unit, names = unit_name(model_id), self._names
        is_systems = self._manager.scope is Scope.SYSTEM
        # The unit as well: a run's id alone would show the log of any service of the host.
        by_unit = [f"{names.writer}={unit}", f"{INVOCATION}={run}", *([] if is_systems else [self._own])]
        by_manager = [f"{names.subject}={unit}", f"{names.run}={run}", "_PID=1" if is_systems else self._own]
        return self._selected(wanted, [by_unit, by_manager])

    def _selected(self, wanted: Excerpt, any_of: Sequence[Sequence[str]]) -> Selection:
        names = self._names
        return Selection(
            any_of=any_of,
            since=wanted.since,
            until=wanted.until,
            fields=tuple(dict.fromkeys((_SYSTEM_UNIT, names.writer, names.subject, names.run, names.cause))),
        )

    async def _current_run(self, model_id: str) -> str | None:
        unit = self._manager.get(unit_name(model_id))
        if unit is not None and unit.invocation_id:
            return unit.invocation_id
        return await self._newest_run(model_id)

    async def _run_before(self, model_id: str, run: str | None) -> str | None:
        if run is None:
            return None
        first = None
        of_run = self._one_run(model_id, Excerpt(), run)
        async with contextlib.aclosing(self._journal.oldest(of_run)) as entries:
            async for entry in entries:
                first = entry.cursor
                break
        return await self._newest_run(model_id, before=first, other_than=run)

    async def _newest_run(self, model_id: str, *, before: str | None = None, other_than: str = "") -> str | None:
        looked_through = 0
        async with contextlib.aclosing(self.newest(model_id, Excerpt(), before=before)) as entries:
            async for entry in entries:
                if entry.invocation_id and entry.invocation_id != other_than:
                    return entry.invocation_id
                looked_through += 1
                if looked_through == _LOOKED_THROUGH:
                    break
        return None

    def _log_entry(self, model_id: str, entry: JournalEntry) -> LogEntry | None:
        unit, names, fields = unit_name(model_id), self._names, entry.fields
        is_own = fields.get(names.writer) == unit
        is_systemds = not is_own and unit in (fields.get(names.subject), fields.get(names.cause))
        if not is_own and not is_systemds and (_SYSTEM_UNIT in fields or names.writer in fields):
            return None  # another unit that goes by this one's name
        priority = entry.priority
        if is_own and priority == _INFORMATION and (level := _LEVEL.match(entry.message)):
            priority = _PRIORITIES[level[1]]
        return LogEntry(
            at=datetime.fromtimestamp(entry.timestamp, UTC),
            message=entry.message,
            priority=priority,
            pid=entry.pid,
            invocation_id=(fields.get(names.run) if is_systemds else entry.invocation_id) or None,
            cursor=entry.cursor,
            is_systemds=is_systemds,
        )
