"""What the journal is told of a server's life: the store of its history (``history.py``), and for who reads along."""

from typing import Final

from magi_agent.servers.desired import Wish
from magi_agent.servers.failure import Failure
from magi_agent.servers.history import BY_AGENT, BY_SYSTEMD, Happened, note
from magi_agent.servers.record import ServerRecord
from magi_agent.systemd.status import UnitChange, UnitStatus

OUTSIDE: Final = "systemctl"
"""Who stopped a server that neither the agent nor a failure has ended."""
_STAYS: Final = "it stays stopped until somebody starts it (magictl start %s; systemctl cannot, as the unit is gone)"


def note_start(model_id: str, record: ServerRecord, wish: Wish | None, unit: UnitStatus | None) -> None:
    """Write down that a server was started, and who wanted that; once for each run."""
    invocation_id = unit.invocation_id or None if unit else None
    if invocation_id is not None and invocation_id == record.start_told:
        return
    record.start_told = invocation_id
    record.retries_told = 0
    is_retry, is_forced = record.attempts > 0, wish is not None and wish.is_forced
    by_force = f", by force{f', though {record.overruled}' if record.overruled else ''}" if is_forced else ""
    message = f"server of {model_id} was started{' again after it had failed' if is_retry else ''}{by_force}"
    note(
        model_id,
        Happened.STARTED,
        message,
        by=BY_AGENT if is_retry or wish is None else wish.by,
        is_forced=is_forced,
        invocation_id=invocation_id,
    )


def note_retry(model_id: str, record: ServerRecord, change: UnitChange) -> None:
    """Write down that systemd itself has started it again, and how it had ended, as far as that was seen."""
    unit = change.after
    if unit is None or unit.active_state != "active":
        return
    if change.before is not None and unit.n_restarts > record.retries_told:
        if record.ended is not None:
            note_failure(model_id, record.ended)
        message = f"server of {model_id} was started again by systemd after it had ended by itself"
        note(model_id, Happened.STARTED, message, by=BY_SYSTEMD, invocation_id=unit.invocation_id or None)
    record.retries_told = unit.n_restarts
    record.ended = None


def note_ready(model_id: str, where: str, lack: Failure | None, unit: UnitStatus) -> None:
    """Write down that a server is ready, and what it does without."""
    but = f", but {lack.message}" if lack else ""
    message = f"server of {model_id} is ready on {where}{but}"
    note(model_id, Happened.READY, message, invocation_id=unit.invocation_id or None)


def note_stop(model_id: str, record: ServerRecord, wish: Wish | None, unit: UnitStatus, *, is_wanted: bool) -> None:
    """Write down that the agent has stopped a server, and who wanted that; once for each run."""
    invocation_id = unit.invocation_id or None
    if invocation_id is not None and invocation_id == record.stop_told:
        # Where systemd's signals come late, the same is planned and done again.
        return
    record.stop_told = invocation_id
    failure = record.failure
    is_for_failure = failure is not None and failure.invocation_id == invocation_id
    note(
        model_id,
        Happened.STOPPED,
        f"server of {model_id} was stopped{', to be started anew' if is_wanted else ''}",
        by=BY_AGENT if is_for_failure or wish is None else wish.by,
        invocation_id=invocation_id,
    )


def note_stop_from_outside(model_id: str, unit: UnitStatus | None) -> None:
    """Write down that somebody else has stopped a server; ``None`` for one of which nobody saw the end."""
    when = "" if unit else " while nobody looked"
    message = f"server of {model_id} was stopped from outside{when}; {_STAYS % model_id}"
    note(model_id, Happened.STOPPED, message, by=OUTSIDE, invocation_id=unit.invocation_id or None if unit else None)


def note_failure(model_id: str, failure: Failure) -> None:
    """Write down how a server failed."""
    note(
        model_id,
        Happened.FAILED,
        f"server of {model_id} failed: {failure.message}{f'; {failure.advice}' if failure.advice else ''}",
        result=failure.result,
        exit_status=failure.exit_status,
        signal=failure.signal,
        invocation_id=failure.invocation_id,
    )
