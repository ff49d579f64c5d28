"""Failures and operations, counted from the stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from magi_agent.errors import OperationNotFound
from magi_agent.events import EventStream, OperationFinished, ServerChanged
from magi_agent.metrics import event_counts as module
from magi_agent.metrics.event_counts import EventCounts
from magi_agent.servers.failure import Failure
from magi_agent.servers.operations import Operation, OperationStatus, Part
from magi_agent.servers.servers import Servers
from magi_agent.vocabulary import ServerState

AT = datetime(2026, 11, 29, tzinfo=UTC)
CRASH = Failure(AT, "exit-code", "it exited with status 1", invocation_id="a")


@dataclass(slots=True)
class KnownOperations:
    """The operations, at the tests' word."""

    by_id: dict[str, Operation]

    def operation(self, operation_id: str) -> Operation:
        try:
            return self.by_id[operation_id]
        except KeyError:
            raise OperationNotFound(operation_id) from None


@dataclass(slots=True)
class Known:
    """What the servers know, at the tests' word."""

    failures: dict[str, Failure] = field(default_factory=dict)
    operations: KnownOperations = field(default_factory=lambda: KnownOperations({}))

    def failure(self, model_id: str) -> Failure | None:
        return self.failures.get(model_id)


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def events() -> EventStream:
    return EventStream()


@pytest.fixture
async def counts(known: Known, events: EventStream) -> AsyncIterator[EventCounts]:
    counting = EventCounts(events, cast(Servers, known))
    task = asyncio.create_task(counting.run())
    await asyncio.sleep(0)
    yield counting
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture
def change(events: EventStream) -> Callable[[str, ServerState], None]:
    def tell(model_id: str, after: ServerState) -> None:
        events.publish(ServerChanged(model_id=model_id, before=ServerState.LOADING, after=after))

    return tell


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_failure_counts_once(counts: EventCounts, known: Known, change: Callable[..., None]) -> None:
    known.failures["toy"] = CRASH
    change("toy", ServerState.COOLDOWN)
    await settle()
    known.failures["toy"] = replace(CRASH, log_lines=("last words",))
    change("toy", ServerState.FAILED)
    await settle()
    assert counts.taken().failures == {("toy", "exit-code"): 1}

    known.failures["toy"] = replace(CRASH, at=AT + timedelta(seconds=30), invocation_id="b", result="oom-kill")
    change("toy", ServerState.STARTING)
    change("toy", ServerState.COOLDOWN)
    await settle()
    assert counts.taken().failures == {("toy", "exit-code"): 1, ("toy", "oom-kill"): 1}


async def test_a_failure_that_is_forgotten_already_still_counts(
    counts: EventCounts, change: Callable[..., None]
) -> None:
    change("toy", ServerState.COOLDOWN)
    await settle()

    assert counts.taken().failures == {("toy", "unknown"): 1}


async def test_models_beyond_many_are_counted_together(
    counts: EventCounts, known: Known, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_PAIRS", 2)
    for model_id in ("a", "b", "c", "d"):
        known.failures[model_id] = CRASH
        change(model_id, ServerState.COOLDOWN)
    await settle()

    assert counts.taken().failures == {("a", "exit-code"): 1, ("b", "exit-code"): 1, ("others", "exit-code"): 2}


async def test_operations(counts: EventCounts, known: Known, events: EventStream) -> None:
    ended = AT + timedelta(seconds=2.5)
    known.operations.by_id = {
        "1": Operation("start-all", {"toy": Part(OperationStatus.SUCCEEDED)}, "1", AT, ended),
        "2": Operation("start-all", {"toy": Part(OperationStatus.FAILED)}, "2", AT, ended),
    }
    for operation_id in ("1", "2", "forgotten"):
        events.publish(OperationFinished(operation_id=operation_id))
    await settle()

    taken = counts.taken()
    assert taken.operations == {("start-all", "succeeded"): 1, ("start-all", "failed"): 1}
    assert taken.operation_seconds == {"start-all": 5.0}
