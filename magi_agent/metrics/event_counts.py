"""What is counted as it happens, from the one stream of events: failures of servers, and operations on several."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.errors import OperationNotFound
from magi_agent.events import EventStream, OperationFinished, ServerChanged
from magi_agent.servers.failure import Failure
from magi_agent.servers.servers import Servers
from magi_agent.vocabulary import ServerState

_FAILED: Final = frozenset({ServerState.FAILED, ServerState.COOLDOWN})
_MOST_PAIRS: Final = 2000
_OTHERS: Final = "others"
"""Stands for the models beyond so many pairs of a model and a result."""
_UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class EventFigures:
    """Counts from the agent's start on."""

    failures: Mapping[tuple[str, str], int]
    """By model and result."""
    operations: Mapping[tuple[str, str], int]
    """By kind and status."""
    operation_seconds: Mapping[str, float]
    """How long all operations of a kind took together."""


class EventCounts:
    """Follows the events of the agent's life."""

    def __init__(self, events: EventStream, servers: Servers) -> None:
        self._events = events
        self._servers = servers
        self._failures: Counter[tuple[str, str]] = Counter()
        self._counted: dict[str, Failure] = {}
        self._operations: Counter[tuple[str, str]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    async def run(self) -> None:
        """Count until cancelled."""
        with self._events.subscribe() as changes:
            async for event in changes:
                match event:
                    case ServerChanged(model_id=model_id, after=after) if after in _FAILED:
                        self._count_failure(model_id)
                    case OperationFinished(operation_id=operation_id):
                        self._count_operation(operation_id)
                    case _:
                        pass

    def taken(self) -> EventFigures:
        """What was counted up to now."""
        return EventFigures(dict(self._failures), dict(self._operations), dict(self._seconds))

    def _count_failure(self, model_id: str) -> None:
        failure = self._servers.failure(model_id)
        if failure is None:
            # Somebody has asked for another try since.
            self._add(model_id, _UNKNOWN)
            return
        before = self._counted.get(model_id)
        # From one state of a failure to another it is still the same, maybe with its last log lines.
        if before is None or (before.at, before.invocation_id) != (failure.at, failure.invocation_id):
            self._counted[model_id] = failure
            self._add(model_id, failure.result)

    def _add(self, model_id: str, result: str) -> None:
        key = (model_id, result)
        if key not in self._failures and len(self._failures) >= _MOST_PAIRS:
            key = (_OTHERS, result)
        self._failures[key] += 1

    def _count_operation(self, operation_id: str) -> None:
        try:
            operation = self._servers.operations.operation(operation_id)
        except OperationNotFound:
            return
        self._operations[operation.kind, operation.status] += 1
        if operation.finished_at is not None:
            self._seconds[operation.kind] += (operation.finished_at - operation.started_at).total_seconds()
