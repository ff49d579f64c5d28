"""Why a unit failed, in the words of systemd and in a sentence."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from magi_agent.servers.failure import Failure, ended_early, failure_of
from magi_agent.systemd.status import UnitStatus, unit_status

INVOCATION = "0123456789abcdef0123456789abcdef"
FAILED = unit_status(
    "magi-llama-m.service",
    {
        "ActiveState": "failed",
        "InvocationID": bytes.fromhex(INVOCATION),
        "StateChangeTimestamp": 1_700_000_000_000_000,
    },
    {"Result": "exit-code", "ExecMainCode": 1, "ExecMainStatus": 1, "NRestarts": 4},
)


@pytest.mark.parametrize(
    ("result", "code", "status", "message", "exit_status", "signal"),
    [
        ("exit-code", 1, 1, "it exited with status 1", 1, None),
        ("exit-code", 1, 203, "systemd could not execute llama-server", 203, None),
        ("exit-code", 1, 217, "systemd could not set its user", 217, None),
        ("exit-code", 1, 226, "systemd could not set up its mount namespace", 226, None),
        ("signal", 2, 9, "it was ended by SIGKILL", None, "SIGKILL"),
        ("core-dump", 3, 11, "it was ended by SIGSEGV", None, "SIGSEGV"),
        ("signal", 2, 250, "it was ended by signal 250", None, "signal 250"),
        ("oom-kill", 2, 9, "it was killed because memory ran out", None, "SIGKILL"),
        ("timeout", 2, 9, "it did not stop, or not start, in the time it had", None, "SIGKILL"),
        ("resources", 0, None, "systemd says 'resources'", None, None),
        ("start-limit-hit", 0, None, "systemd says 'start-limit-hit'", None, None),
    ],
)
def test_each_way_to_fail_has_its_sentence(
    result: str, code: int, status: int | None, message: str, exit_status: int | None, signal: str | None
) -> None:
    failure = failure_of(replace(FAILED, result=result, exec_main_code=code, exec_main_status=status))

    assert failure.message.startswith(message)
    assert (failure.result, failure.exit_status, failure.signal) == (result, exit_status, signal)


def test_the_rest_is_systemds_own_word() -> None:
    assert failure_of(FAILED) == Failure(
        at=datetime.fromtimestamp(1_700_000_000, UTC),
        result="exit-code",
        message="it exited with status 1",
        exit_status=1,
        invocation_id=INVOCATION,
        restarts=4,
    )
    assert failure_of(replace(FAILED, invocation_id="")).invocation_id is None


def test_a_time_that_systemd_does_not_say_is_now() -> None:
    before = datetime.now(UTC)

    assert before <= failure_of(replace(FAILED, state_change_timestamp=None)).at <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("code", "status", "how"), [(1, 0, "with status 0"), (2, 15, "by SIGTERM"), (0, None, "with status 0")]
)
def test_a_clean_end_that_came_too_early(code: int, status: int | None, how: str) -> None:
    unit: UnitStatus = replace(FAILED, result="success", exec_main_code=code, exec_main_status=status)

    failure = ended_early(unit)

    assert failure.result == "ended-early"
    assert failure.message == f"it ended by itself, {how}, before it was ready"
