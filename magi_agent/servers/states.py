"""The one state that a server is in, from all that is known of it: a pure function."""

from typing import Final

from magi_agent.servers.plan import UnitCondition, Verb
from magi_agent.servers.record import ServerRecord
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerState

UP: Final = frozenset({ServerState.READY, ServerState.DEGRADED})
"""It answers."""
RUNNING: Final = frozenset({*UP, ServerState.STARTING, ServerState.LOADING, ServerState.STOPPING, ServerState.STUCK})
"""It has processes, or is about to."""
DOWN: Final = frozenset({ServerState.STOPPED, ServerState.FAILED})
"""Nothing of it is there."""


def state_of(
    record: ServerRecord, unit: UnitStatus | None, *, wanted: bool | None, startable: bool
) -> ServerState | None:
    """The state as it follows from what is known; ``None`` while that is not settled, and the last one holds.

    ``wanted`` says whether it should run, ``None`` where nobody spoke about it; ``startable`` whether anything is
    started now.
    """
    match record.condition(unit):
        case UnitCondition.UP if unit is not None:
            return _state_up(record, unit, wanted)
        case UnitCondition.STUCK:
            return ServerState.STUCK
        case UnitCondition.GOING:
            return ServerState.STOPPING
        case UnitCondition.QUEUED:
            # The end of a stop, or the middle of a restart: what comes next will tell.
            return ServerState.STARTING if record.is_doing(Verb.START) else None
        case _ if record.recording is not None:
            return None
        case condition if wanted:
            if record.failure is not None:
                return ServerState.COOLDOWN
            if startable:
                return ServerState.STARTING
            return ServerState.FAILED if condition is UnitCondition.FAILED else ServerState.STOPPED
        case UnitCondition.FAILED:
            # Without a failure it is one that had to be killed to stop it, and is about to be cleared away.
            return ServerState.STOPPING if record.failure is None else ServerState.FAILED
        case _:
            return ServerState.STOPPING if record.is_doing(Verb.START) else ServerState.STOPPED


def _state_up(record: ServerRecord, unit: UnitStatus, wanted: bool | None) -> ServerState:
    if record.ending or wanted is False:
        return ServerState.STOPPING
    if unit.active_state != "active" or unit.main_pid is None:
        return ServerState.STARTING
    is_ready = record.proven == (unit.invocation_id, unit.main_pid)
    if not is_ready:
        return ServerState.LOADING
    return ServerState.READY if record.lack is None else ServerState.DEGRADED
