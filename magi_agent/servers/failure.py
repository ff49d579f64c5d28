"""Why a server failed, as a person and a program want to know it."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.systemd.status import UnitStatus

LOG_LINES: Final = 20
INSUFFICIENT_MEMORY: Final = "insufficient-memory"
_REFUSALS: Final = {
    "PortInUse": "port-in-use",
    "ModelNotUsable": "not-usable",
    "NoFreePort": "no-free-port",
    "SettingsNotUsable": "settings",
    "InsufficientMemory": INSUFFICIENT_MEMORY,
}
"""In one word, why a server was not started, by the error."""
_EXITED: Final = 1  # CLD_EXITED of siginfo: the status is an exit status; otherwise it is a signal's number.
# Exit statuses that systemd itself gives a process it could not execute: systemd.exec(5), "Process exit codes".
NOT_EXECUTED: Final = 203
_SYSTEMD_STATUS: Final = {
    200: "systemd could not enter its working directory",
    NOT_EXECUTED: "systemd could not execute llama-server",
    216: "systemd could not set its group: is there such a group?",
    217: "systemd could not set its user: is there such a user?",
    226: "systemd could not set up its mount namespace: is there a folder in the settings that does not exist?",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed run, or one start that could not be made."""

    at: datetime
    result: str
    """systemd's ``Result`` of the unit, or the agent's own word: ``start-timeout``, ``port-in-use``, ``no-free-port``,
    ``not-reachable``, ``not-usable``, ``ended-early``, ``start-error``, ``stop-error``, ``hung``, ``stuck``,
    ``insufficient-memory``; of one that is degraded, ``no-gpu``.
    """
    message: str
    """One sentence."""
    advice: str | None = None
    """What to do about it, where that is known."""
    exit_status: int | None = None
    signal: str | None = None
    """Its name: ``SIGKILL``."""
    invocation_id: str | None = None
    restarts: int = 0
    """How often systemd tried again by itself before it gave up."""
    log_lines: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    """What a program can use of a start that could not be made, with camelCase keys."""

    def is_of(self, unit: UnitStatus) -> bool:
        """Whether it is the failure of the unit's run as it is shown now."""
        return self.invocation_id is not None and self.invocation_id == unit.invocation_id


def ended_early(unit: UnitStatus) -> Failure:
    """A server that ended cleanly and by itself, which systemd calls a success, before it was ready."""
    failure = failure_of(unit)
    how = f"by {failure.signal}" if failure.signal else f"with status {failure.exit_status or 0}"
    return replace(failure, result="ended-early", message=f"it ended by itself, {how}, before it was ready")


def not_started(error: MagiError) -> Failure:
    """A start that could not be made."""
    advice = error.details.get("advice")
    return Failure(
        datetime.now(UTC),
        _REFUSALS.get(error.error, "start-error"),
        str(error),
        advice=advice if isinstance(advice, str) else None,
        details=error.details,
    )


def failure_of(unit: UnitStatus) -> Failure:
    """What systemd says of a failed unit; the log lines come from elsewhere."""
    exit_status = signal_name = None
    if unit.exec_main_status is not None:
        if unit.exec_main_code == _EXITED:
            exit_status = unit.exec_main_status
        else:
            signal_name = _signal_name(unit.exec_main_status)
    if unit.result == "oom-kill":
        message = "it was killed because memory ran out"
    elif unit.result == "timeout":
        message = "it did not stop, or not start, in the time it had"
    elif exit_status is not None and unit.result == "exit-code":
        message = _SYSTEMD_STATUS.get(exit_status, f"it exited with status {exit_status}")
    elif signal_name:
        message = f"it was ended by {signal_name}"
    else:
        message = f"systemd says {unit.result!r}"
    return Failure(
        at=datetime.fromtimestamp(unit.state_change_timestamp, UTC)
        if unit.state_change_timestamp
        else datetime.now(UTC),
        result=unit.result,
        message=message,
        exit_status=exit_status,
        signal=signal_name,
        invocation_id=unit.invocation_id or None,
        restarts=unit.n_restarts,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
