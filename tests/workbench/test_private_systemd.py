"""The private systemd manager: real units, a real journal, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import locations
import pytest

from tests.conftest import SystemdUser

WRAPPER = [sys.executable, str(locations.CHECKOUT / "packaging" / "workbench" / "private_systemd.py"), "--"]
# Found again among all processes, and like no other's.
SLEEP_SECONDS = "7654.321"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **options)  # type: ignore[call-overload,no-any-return]


def run_in_new(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script beside a manager of its own, nested in the one of the tests."""
    return run(*WRAPPER, "bash", "-c", script)


def private_cgroups() -> set[Path]:
    # Not by rglob, which fails where a folder goes while it is walked.
    return {
        Path(parent, name)
        for parent, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if name.startswith("magi-private-")
    }


def sleepers() -> list[int]:
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if SLEEP_SECONDS.encode() in command_line.read_bytes().split(b"\0"):
                found.append(int(command_line.parent.name))
        except OSError:
            continue
    return found


def test_a_transient_unit_runs_in_the_manager_and_leaves_its_exit_status(systemd_user: SystemdUser) -> None:
    ended = run("systemd-run", "--user", "--wait", "--quiet", "--collect", "sh", "-c", "exit 7")

    assert ended.returncode == 7


def test_what_a_unit_prints_is_in_the_journal_under_its_unit_and_identifier(systemd_user: SystemdUser) -> None:
    unit = "workbench-speaks.service"
    script = "echo spoken in the unit; sleep 0.2"
    run("systemd-run", "--user", "--wait", "--unit", unit, "-p", "SyslogIdentifier=speaker", "sh", "-c", script)

    def entries(match: str) -> list[dict[str, str]]:
        lines = run("journalctl", "-D", str(systemd_user.journal), "-o", "json", match).stdout.splitlines()
        return [json.loads(line) for line in lines]

    wait_until(lambda: bool(entries("SYSLOG_IDENTIFIER=speaker")), "the line is in the journal")
    [entry] = entries("SYSLOG_IDENTIFIER=speaker")
    assert entry["MESSAGE"] == "spoken in the unit"
    assert entry["_SYSTEMD_USER_UNIT"] == unit


def test_the_bus_comes_back_after_it_was_killed_and_the_manager_with_it(systemd_user: SystemdUser) -> None:
    def bus_process() -> str:
        return run("systemctl", "--user", "show", "--property=MainPID", "--value", "dbus.service").stdout.strip()

    def manager_answers() -> bool:
        call = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer", "Ping")
        return run("busctl", "--user", "call", *call).returncode == 0

    assert manager_answers()
    before = bus_process()
    run("systemctl", "--user", "kill", "--signal=KILL", "dbus.service")
    wait_until(lambda: bus_process() != before, "the old bus is gone")
    wait_until(manager_answers, "the manager answers on the new bus")


def test_the_command_finds_the_manager_by_its_environment(systemd_user: SystemdUser) -> None:
    ended = run_in_new('echo "$MAGI_SYSTEMD_SCOPE"; systemctl --user is-system-running; stat -c %a "$XDG_RUNTIME_DIR"')

    assert ended.stdout.splitlines() == ["user", "running", "700"]
    assert ended.stderr == ""


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 42", 42), ("kill -TERM $$", 128 + 15)])
def test_the_status_of_the_command_is_passed_on(systemd_user: SystemdUser, script: str, status: int) -> None:
    assert run_in_new(script).returncode == status


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -KILL $$", "private systemd: the command was ended by SIGKILL\n"),
        ("kill -SEGV $$", "private systemd: the command was ended by SIGSEGV\n"),
        ("kill -TERM $$", ""),
        ("kill -INT $$", ""),
    ],
)
def test_a_command_that_nobody_asked_to_end_is_reported(systemd_user: SystemdUser, script: str, said: str) -> None:
    assert run_in_new(script).stderr == said


def test_a_command_that_does_not_exist_is_reported(systemd_user: SystemdUser) -> None:
    ended = run(*WRAPPER, "/nonexistent/program")

    assert ended.returncode == 127
    assert "cannot run /nonexistent/program: No such file or directory" in ended.stderr


def test_signals_reach_the_command(systemd_user: SystemdUser) -> None:
    script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*WRAPPER, "bash", "-c", script], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        assert front.stdout.readline() == "ready\n"
        front.send_signal(signal.SIGTERM)

        assert front.stdout.read() == "got it\n"
        assert front.wait(10) == 3


def test_units_that_still_run_end_with_the_command(systemd_user: SystemdUser) -> None:
    ended = run_in_new(
        "cat /proc/self/cgroup; "
        f"systemd-run --user --quiet sleep {SLEEP_SECONDS}; setsid sleep {SLEEP_SECONDS} & exit 0"
    )

    assert ended.returncode == 0
    assert sleepers() == []
    # Others of this machine come and go meanwhile.
    made = re.findall(r"magi-private-[^/\n]+", ended.stdout)[-1]
    assert made not in {path.name for path in private_cgroups()}


def test_killing_the_front_leaves_no_process_and_no_cgroup(systemd_user: SystemdUser) -> None:
    before = private_cgroups()
    script = f"systemd-run --user --quiet sleep {SLEEP_SECONDS}; echo ready; exec sleep {SLEEP_SECONDS}"
    with subprocess.Popen([*WRAPPER, "bash", "-c", script], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        assert front.stdout.readline() == "ready\n"
        wait_until(lambda: len(sleepers()) == 2, "both processes run")
        made = private_cgroups() - before
        assert made
        os.kill(front.pid, signal.SIGKILL)
        front.wait(10)

    wait_until(lambda: sleepers() == [], "both processes are gone")
    wait_until(lambda: not made & private_cgroups(), "the cgroups are removed")


def test_the_mounts_of_the_machine_stay_as_they_were(systemd_user: SystemdUser) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    run_in_new("true")

    assert Path("/proc/self/mountinfo").read_text() == before
