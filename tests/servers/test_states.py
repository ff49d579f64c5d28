"""The one state of a server, and what is remembered to tell it: tables, without systemd."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest

from magi_agent.servers.failure import Failure
from magi_agent.servers.plan import UnitCondition, Verb, condition_of
from magi_agent.servers.record import ServerRecord
from magi_agent.servers.states import state_of
from magi_agent.systemd.status import UnitStatus, unit_status
from magi_agent.vocabulary import ServerState

FAILURE = Failure(datetime(2026, 1, 1, tzinfo=UTC), "exit-code", "it exited with status 1")
RUN = ("0" * 32, 42)
UNIT = replace(
    unit_status("magi-llama-m.service", {"LoadState": "loaded", "ActiveState": "active"}, {}),
    invocation_id=RUN[0],
    main_pid=RUN[1],
)
INACTIVE = replace(UNIT, active_state="inactive", main_pid=None)
FAILED = replace(UNIT, active_state="failed", main_pid=None)


@pytest.mark.parametrize(
    ("unit", "condition"),
    [
        (None, UnitCondition.ABSENT),
        (replace(UNIT, load_state="not-found"), UnitCondition.ABSENT),
        (INACTIVE, UnitCondition.ABSENT),
        (replace(UNIT, active_state="maintenance"), UnitCondition.ABSENT),
        (UNIT, UnitCondition.UP),
        (replace(UNIT, active_state="activating"), UnitCondition.UP),
        (replace(UNIT, active_state="reloading"), UnitCondition.UP),
        (replace(UNIT, job_id=7), UnitCondition.UP),
        (replace(UNIT, active_state="deactivating"), UnitCondition.GOING),
        (replace(UNIT, active_state="deactivating", job_id=7), UnitCondition.GOING),
        (replace(INACTIVE, job_id=7), UnitCondition.QUEUED),
        (replace(FAILED, job_id=7), UnitCondition.QUEUED),
        (FAILED, UnitCondition.FAILED),
    ],
)
def test_what_matters_of_a_unit(unit: UnitStatus | None, condition: UnitCondition) -> None:
    assert condition_of(unit) is condition
    assert ServerRecord().condition(unit) is condition
    # A failure that is not certain is none yet, and nothing else is put in doubt.
    expected = UnitCondition.QUEUED if condition is UnitCondition.FAILED else condition
    assert ServerRecord(doubtful=RUN[0]).condition(unit) is expected


def test_a_try_before_its_time_that_lacks_the_same_makes_no_pause_longer() -> None:
    lacking = replace(FAILURE, result="insufficient-memory")
    record = ServerRecord()
    record.count_failure(lacking, 100.0)
    for now in (101.0, 102.0, 103.0):
        record.try_early()
        assert record.retry_at == 0.0
        record.count_failure(lacking, now)
        assert record.retry_at == now + 10

    record.count_failure(lacking, 113.0)
    assert record.retry_at == 113.0 + 20
    record.try_early()
    record.count_failure(FAILURE, 114.0)
    assert record.retry_at == 114.0 + 40


@pytest.mark.parametrize(
    ("record", "unit", "wanted", "startable", "state"),
    [
        (ServerRecord(), None, None, True, ServerState.STOPPED),
        (ServerRecord(), None, False, True, ServerState.STOPPED),
        (ServerRecord(), None, True, True, ServerState.STARTING),
        (ServerRecord(), None, True, False, ServerState.STOPPED),
        (ServerRecord(failure=FAILURE), None, True, True, ServerState.COOLDOWN),
        (ServerRecord(failure=FAILURE), None, False, True, ServerState.STOPPED),
        (ServerRecord(failure=FAILURE), FAILED, True, True, ServerState.COOLDOWN),
        (ServerRecord(failure=FAILURE), FAILED, None, True, ServerState.FAILED),
        (ServerRecord(failure=FAILURE), FAILED, False, True, ServerState.FAILED),
        (ServerRecord(), FAILED, True, True, ServerState.STARTING),
        (ServerRecord(), FAILED, True, False, ServerState.FAILED),
        (ServerRecord(), FAILED, False, True, ServerState.STOPPING),
        (ServerRecord(failure=FAILURE, recording=FAILURE), FAILED, True, True, None),
        (ServerRecord(failure=FAILURE, recording=FAILURE), None, True, True, None),
        (ServerRecord(doubtful=RUN[0]), FAILED, True, True, None),
        (ServerRecord(), replace(INACTIVE, job_id=7), True, True, None),
        (ServerRecord(), replace(UNIT, active_state="activating"), True, True, ServerState.STARTING),
        (ServerRecord(), replace(UNIT, main_pid=None), True, True, ServerState.STARTING),
        (ServerRecord(), UNIT, True, True, ServerState.LOADING),
        (ServerRecord(), UNIT, None, True, ServerState.LOADING),
        (ServerRecord(proven=RUN), UNIT, True, True, ServerState.READY),
        (ServerRecord(proven=RUN), UNIT, None, True, ServerState.READY),
        (ServerRecord(proven=RUN, lack=FAILURE), UNIT, True, True, ServerState.DEGRADED),
        (ServerRecord(proven=RUN, lack=FAILURE), UNIT, False, True, ServerState.STOPPING),
        (ServerRecord(proven=(RUN[0], 43), lack=FAILURE), UNIT, True, True, ServerState.LOADING),
        (ServerRecord(lack=FAILURE), None, True, True, ServerState.STARTING),
        (ServerRecord(proven=RUN), UNIT, True, False, ServerState.READY),
        (ServerRecord(proven=(RUN[0], 43)), UNIT, True, True, ServerState.LOADING),
        (ServerRecord(proven=("1" * 32, 42)), UNIT, True, True, ServerState.LOADING),
        (ServerRecord(proven=RUN), UNIT, False, True, ServerState.STOPPING),
        (ServerRecord(proven=RUN, ending=True), UNIT, True, True, ServerState.STOPPING),
        (ServerRecord(proven=RUN), replace(UNIT, active_state="deactivating"), True, True, ServerState.STOPPING),
        (ServerRecord(failure=FAILURE, recording=FAILURE), UNIT, True, True, ServerState.LOADING),
        (ServerRecord(stuck=FAILURE), FAILED, True, True, ServerState.STUCK),
        (ServerRecord(stuck=FAILURE, doubtful=RUN[0]), FAILED, False, True, ServerState.STUCK),
        (ServerRecord(stuck=FAILURE, failure=FAILURE, recording=FAILURE), INACTIVE, None, False, ServerState.STUCK),
        (ServerRecord(stuck=FAILURE), None, False, True, ServerState.STUCK),
    ],
)
def test_the_state_that_follows(
    record: ServerRecord, unit: UnitStatus | None, wanted: bool | None, startable: bool, state: ServerState | None
) -> None:
    assert state_of(record, unit, wanted=wanted, startable=startable) is state


async def test_a_start_under_way_shows() -> None:
    with _starting() as record:
        assert record.is_doing(Verb.START)
        assert not record.is_doing(Verb.STOP)
        assert state_of(record, replace(INACTIVE, job_id=7), wanted=True, startable=True) is ServerState.STARTING
        # Nobody wants it any more, and it may still appear.
        assert state_of(record, None, wanted=False, startable=True) is ServerState.STOPPING


def test_there_is_always_at_most_one_state_and_a_known_one() -> None:
    states = ("active", "activating", "deactivating", "inactive", "failed", "reloading", "maintenance", "new-word")
    units = [None, *(replace(UNIT, active_state=each) for each in states)]
    for unit, job, pid, wanted, startable, ending, failure in product(
        units, (None, 7), (None, 42), (None, False, True), (False, True), (False, True), (None, FAILURE)
    ):
        seen = unit and replace(unit, job_id=job, main_pid=pid)
        state = state_of(ServerRecord(ending=ending, failure=failure), seen, wanted=wanted, startable=startable)
        assert state is None or state in ServerState


def test_each_failure_cools_down_twice_as_long_up_to_five_minutes_and_for_ever_so() -> None:
    record = ServerRecord()
    pauses = []
    for _ in range(5000):
        record.count_failure(FAILURE, 1000.0)
        assert record.retry_at is not None
        pauses.append(record.retry_at - 1000.0)

    assert pauses[:7] == [10, 20, 40, 80, 160, 300, 300]
    assert pauses[-1] == 300
    assert record.failure is FAILURE


@pytest.mark.parametrize(("ready_for", "pause"), [(59.0, 20.0), (60.0, 10.0), (10_000.0, 10.0)])
def test_a_server_that_was_ready_long_enough_begins_anew(ready_for: float, pause: float) -> None:
    record = ServerRecord()
    record.count_failure(FAILURE, 0.0)
    record.ready_since = 100.0
    record.count_failure(FAILURE, 100.0 + ready_for)

    assert record.retry_at == 100.0 + ready_for + pause


@contextmanager
def _starting() -> Iterator[ServerRecord]:
    step = asyncio.get_running_loop().create_task(asyncio.sleep(60))
    try:
        yield ServerRecord(step=step, verb=Verb.START)
    finally:
        step.cancel()
