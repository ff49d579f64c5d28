"""systemd's properties as our own types."""

from __future__ import annotations

import pytest

from magi_agent.systemd.bus import Bus
from magi_agent.systemd.status import NOT_SET, figure, unit_path, unit_status
from magi_agent.systemd.unit_table import MANAGER, MANAGER_PATH, SYSTEMD
from magi_agent.vocabulary import Scope
from tests.conftest import SystemdUser

UNIT = {
    "ActiveEnterTimestamp": 1_700_000_000_250_000,
    "ActiveState": "failed",
    "Description": "toy",
    "FragmentPath": "/run/toy.service",
    "InactiveEnterTimestamp": 0,
    "InvocationID": bytes(range(16)),
    "Job": [7, "/org/freedesktop/systemd1/job/7"],
    "LoadState": "loaded",
    "NeedDaemonReload": True,
    "StateChangeTimestamp": NOT_SET,
    "SubState": "failed",
}
SERVICE = {
    "ControlGroup": "/magi-llama.slice/toy.service",
    "Environment": ["A=1", "B="],
    "ExecMainCode": 1,
    "ExecMainExitTimestamp": 1_700_000_001_000_000,
    "ExecMainStartTimestamp": 1_700_000_000_000_000,
    "ExecMainStatus": 203,
    "ExecStart": [["/bin/x", ["/bin/x", "--y"], False, 0, 0, 0, 0, 0, 0, 0]],
    "MainPID": 0,
    "NRestarts": 3,
    "Result": "exit-code",
    "Slice": "magi-llama.slice",
}


def test_all_of_it() -> None:
    status = unit_status("toy.service", UNIT, SERVICE)

    assert (status.name, status.description, status.load_state) == ("toy.service", "toy", "loaded")
    assert (status.active_state, status.sub_state, status.result) == ("failed", "failed", "exit-code")
    assert status.main_pid is None
    assert (status.exec_main_code, status.exec_main_status, status.n_restarts) == (1, 203, 3)
    assert status.invocation_id == "000102030405060708090a0b0c0d0e0f"
    assert status.control_group == "/magi-llama.slice/toy.service"
    assert (status.fragment_path, status.slice) == ("/run/toy.service", "magi-llama.slice")
    assert status.active_enter_timestamp == 1_700_000_000.25
    assert status.inactive_enter_timestamp is None
    assert status.exec_main_start_timestamp == 1_700_000_000.0
    assert status.exec_main_exit_timestamp == 1_700_000_001.0
    assert status.state_change_timestamp is None
    assert status.argv == ("/bin/x", "--y")
    assert status.environment == ("A=1", "B=")
    assert status.job_id == 7
    assert status.need_daemon_reload


def test_nothing_of_it() -> None:
    status = unit_status("toy.service", {}, {})

    assert (status.active_state, status.result, status.invocation_id) == ("", "", "")
    assert (status.main_pid, status.exec_main_status, status.job_id) == (None, None, None)
    assert (status.argv, status.environment) == ((), ())
    assert not status.need_daemon_reload


def test_an_exit_status_is_one_only_after_the_end() -> None:
    running = {**SERVICE, "ExecMainCode": 0, "ExecMainStatus": 0, "MainPID": 42}

    status = unit_status("toy.service", UNIT, running)

    assert status.exec_main_status is None
    assert status.main_pid == 42


@pytest.mark.parametrize(
    "changes",
    [
        {"InvocationID": bytes(16)},
        {"InvocationID": "text"},
        {"Job": [0, "/"]},
        {"Job": []},
        {"Job": "text"},
    ],
)
def test_what_is_not_there_or_not_as_expected_is_empty(changes: dict[str, object]) -> None:
    status = unit_status("toy.service", {**UNIT, **changes}, SERVICE)

    assert status.invocation_id == "" or "InvocationID" not in changes
    assert status.job_id is None or "Job" not in changes


@pytest.mark.parametrize("started", [None, [], [[]], [["/bin/x"]], [["/bin/x", "text"]]])
def test_a_command_line_of_another_form_is_none(started: object) -> None:
    assert unit_status("toy.service", UNIT, {**SERVICE, "ExecStart": started}).argv == ()


@pytest.mark.parametrize(
    ("value", "expected"), [(5, 5), (0, 0), (NOT_SET, None), (None, None), (True, None), ("5", None)]
)
def test_a_figure_that_is_not_set_is_none(value: object, expected: int | None) -> None:
    assert figure(value) == expected


@pytest.mark.parametrize(
    "name",
    [
        "systemdtest-path.service",
        "systemdtest_a:b.c@d\\x2de.service",
        "9systemdtest.service",
        "systemdtest-smollm2-135m-instruct.q4_1.service",
    ],
)
async def test_object_paths_are_systemds_own(systemd_user: SystemdUser, name: str) -> None:
    bus = await Bus.connect(Scope.USER)
    [path] = await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "LoadUnit", "s", name)
    bus.close()

    assert unit_path(name) == path
