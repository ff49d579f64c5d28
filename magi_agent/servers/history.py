"""What happened to each model's server, and who asked for it: the journal keeps it, over restarts of the agent.

The agent writes a structured record where it starts, stops or loses a server. Where it was not there, systemd's own
records of the unit say what happened, though not on whose word. The fields that the records are told by can be claimed
by any process; what counts is that the agent's user, or systemd itself, wrote them. How far back a history goes is what
journald keeps.
"""

import contextlib
import logging
import os
import signal as signals
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from magi_agent.log_output import HISTORY
from magi_agent.servers.launch import unit_name
from magi_agent.systemd.journal import Journal, Selection
from magi_agent.systemd.journal_entries import JournalEntry
from magi_agent.vocabulary import Scope

MESSAGE_ID: Final = "6b2c0c5d0b4f4a0f9d5a3c1e7f8a2d64"
"""Of every record of the agent's; ``MAGI_EVENT`` says which kind of event it is."""
BY_AGENT: Final = "agent"
BY_SYSTEMD: Final = "systemd"

_LOG: Final = logging.getLogger(HISTORY)
_RECORDS_FOR_EVENT: Final = 4
"""What systemd and the agent write of one event, at the most."""
_SPARE_RECORDS: Final = 200

# systemd's own records: /usr/lib/systemd/catalog/systemd.catalog, sd-messages.h.
_STARTED: Final = "39f53479d3a045ac8e11786248231fbf"
_ENDED_WELL: Final = "7ad2d189f7e94e70a38c781354912448"
_FAILED: Final = "d9b373ed55a64feb8242e02dbe79a49c"
_PROCESS_ENDED: Final = "98e322203f7a4ed290d09fe03c09fe15"
_SYSTEMDS: Final = (_STARTED, _ENDED_WELL, _FAILED, _PROCESS_ENDED)


class Happened(StrEnum):
    """Kinds of events."""

    STARTED = "started"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


_ENDS: Final = frozenset({Happened.STOPPED, Happened.FAILED})


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One thing that happened to a server."""

    at: datetime
    event: Happened
    message: str
    by: str | None = None
    result: str | None = None
    exit_status: int | None = None
    signal: str | None = None
    invocation_id: str | None = None
    is_forced: bool | None = None
    """Of a start of the agent's, whether somebody had it made also where it does not fit into memory."""


@dataclass(frozen=True, slots=True)
class PastEvents:
    """The newest part of a history, oldest event first."""

    events: Sequence[HistoryEvent]
    truncated: bool
    """Whether the journal has earlier ones."""


def note(
    model_id: str,
    event: Happened,
    message: str,
    *,
    by: str | None = None,
    result: str | None = None,
    exit_status: int | None = None,
    signal: str | None = None,
    invocation_id: str | None = None,
    is_forced: bool | None = None,
) -> None:
    """Write an event down. ``message`` is a line of the log, whose reader does not know which model it is about."""
    _LOG.log(
        logging.ERROR if event is Happened.FAILED else logging.INFO,
        "%s",
        message,
        extra={
            "magi_message_id": MESSAGE_ID,
            "magi_model": model_id,
            "magi_event": event.value,
            "magi_by": by,
            "magi_result": result,
            "magi_exit_status": exit_status,
            "magi_signal": signal,
            "magi_invocation": invocation_id,
            "magi_forced": None if is_forced is None else str(is_forced).lower(),
        },
    )


class History:
    """Reads what was written down."""

    def __init__(self, journal: Journal, scope: Scope) -> None:
        self._journal = journal
        self._scope = scope

    async def of(self, model_id: str, limit: int) -> PastEvents:
        """The last events of one model's server, ``limit`` at the most. Raises ``JournalError``."""
        most = limit * _RECORDS_FOR_EVENT + _SPARE_RECORDS
        records: list[JournalEntry] = []
        is_cut = False
        async with contextlib.aclosing(self._journal.newest(self._selection(model_id))) as entries:
            async for entry in entries:
                if len(records) == most:
                    is_cut = True
                    break
                records.append(entry)
        events = events_of(reversed(records))
        return PastEvents(events[-limit:], is_cut or len(events) > limit)

    def _selection(self, model_id: str) -> Selection:
        unit, uid = unit_name(model_id), f"_UID={os.geteuid()}"
        of_unit = [f"UNIT={unit}", "_PID=1"] if self._scope is Scope.SYSTEM else [f"USER_UNIT={unit}", uid]
        return Selection(
            any_of=[
                [f"MESSAGE_ID={MESSAGE_ID}", f"MAGI_MODEL={model_id}", uid],
                *([f"MESSAGE_ID={message_id}", *of_unit] for message_id in _SYSTEMDS),
            ],
            fields=(
                *("MESSAGE_ID", "MAGI_EVENT", "MAGI_BY", "MAGI_RESULT", "MAGI_EXIT_STATUS", "MAGI_SIGNAL"),
                *("MAGI_INVOCATION", "MAGI_FORCED"),
                *("INVOCATION_ID", "USER_INVOCATION_ID", "UNIT_RESULT", "EXIT_CODE", "EXIT_STATUS"),
            ),
        )


def events_of(records: Iterable[JournalEntry]) -> list[HistoryEvent]:
    """The events that records tell of, oldest first as these: each once, in the agent's words where it was there."""
    ordered = list(records)
    told = {
        (event.invocation_id, event.event in _ENDS)
        for record in ordered
        if (event := _by_agent(record)) and event.invocation_id and event.event is not Happened.READY
    }
    exits: dict[str, JournalEntry] = {}
    ready: set[str | None] = set()
    events: list[HistoryEvent] = []
    for record in ordered:
        if record.fields.get("MESSAGE_ID") == _PROCESS_ENDED:
            exits[_run_of(record)] = record
            continue
        event = _by_agent(record)
        if event is None:
            event = _by_systemd(record, exits.get(_run_of(record)))
            if event is not None and (event.invocation_id, event.event in _ENDS) not in told:
                events.append(event)
        elif event.event is Happened.STOPPED and event.invocation_id is None and _is_unclaimed_end(events):
            # What an agent that was away found out when it came back: systemd knows when it was.
            events[-1] = replace(events[-1], by=event.by)
        elif event.event is not Happened.READY or event.invocation_id not in ready:
            events.append(event)
            # The next agent finds it ready too.
            ready |= {event.invocation_id} if event.event is Happened.READY else set()
    return events


def _is_unclaimed_end(events: Sequence[HistoryEvent]) -> bool:
    return bool(events) and events[-1].event is Happened.STOPPED and events[-1].by is None


def _by_agent(record: JournalEntry) -> HistoryEvent | None:
    fields = record.fields
    if fields.get("MESSAGE_ID") != MESSAGE_ID or fields.get("MAGI_EVENT") not in set(Happened):
        return None
    status = fields.get("MAGI_EXIT_STATUS", "")
    return HistoryEvent(
        at=datetime.fromtimestamp(record.timestamp, UTC),
        event=Happened(fields["MAGI_EVENT"]),
        message=record.message,
        by=fields.get("MAGI_BY"),
        result=fields.get("MAGI_RESULT"),
        exit_status=int(status) if status.isdecimal() else None,
        signal=fields.get("MAGI_SIGNAL"),
        invocation_id=fields.get("MAGI_INVOCATION"),
        is_forced={"true": True, "false": False}.get(fields.get("MAGI_FORCED", "")),
    )


def _by_systemd(record: JournalEntry, exit_record: JournalEntry | None) -> HistoryEvent | None:
    at, run = datetime.fromtimestamp(record.timestamp, UTC), _run_of(record) or None
    match record.fields.get("MESSAGE_ID"):
        case str(message_id) if message_id == _STARTED:
            return HistoryEvent(at, Happened.STARTED, record.message, by=BY_SYSTEMD, invocation_id=run)
        case str(message_id) if message_id == _ENDED_WELL:
            return HistoryEvent(at, Happened.STOPPED, record.message, result="success", invocation_id=run)
        case str(message_id) if message_id == _FAILED:
            code = exit_record.fields.get("EXIT_CODE", "") if exit_record else ""
            status = exit_record.fields.get("EXIT_STATUS", "") if exit_record else ""
            return HistoryEvent(
                at,
                Happened.FAILED,
                record.message,
                result=record.fields.get("UNIT_RESULT"),
                exit_status=int(status) if code == "exited" and status.isdecimal() else None,
                signal=_signal(status) if code in ("killed", "dumped") else None,
                invocation_id=run,
            )
        case _:
            return None


def _run_of(record: JournalEntry) -> str:
    return record.fields.get("INVOCATION_ID") or record.fields.get("USER_INVOCATION_ID", "")


def _signal(status: str) -> str | None:
    try:
        return signals.Signals(int(status)).name
    except ValueError:
        return status or None
