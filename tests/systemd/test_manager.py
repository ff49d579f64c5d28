"""Starting, stopping and following real units, through everything that a manager and its bus may go through."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path

import locations
import pytest

from magi_agent.systemd.errors import (
    BusCallFailed,
    BusDisconnected,
    BusError,
    BusTimeout,
    JobTimeout,
    NoSuchUnit,
    UnitExists,
)
from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager, major_version
from magi_agent.systemd.status import UnitChange, UnitStatus
from magi_agent.systemd.transient import KillMode, Restart, Sandbox, TransientService
from magi_agent.vocabulary import Scope
from tests.conftest import SystemdUser
from tests.cuttable_bus import CuttableBus
from tests.systemd.units import PATTERN, MakeName, run, shown, systemctl, until

STARTS = 30.0
Changes = tuple[SystemdManager, list[UnitChange], list[bool]]
Cuttable = tuple[SystemdManager, CuttableBus]
"""A connected manager, what it told about units, and what about its connection."""

WRAPPER = [sys.executable, str(locations.CHECKOUT / "packaging" / "workbench" / "private_systemd.py"), "--"]


def service(name: str, *argv: str, **changes: object) -> TransientService:
    plain = TransientService(
        name=name, description="a test's unit", argv=argv or ("/usr/bin/sleep", "600"), sandbox=Sandbox.NONE
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture
def deaf(tmp_path: Path) -> tuple[str, str]:
    """The command line of a program that ignores SIGTERM; `ignoring` beside it appears when it does."""
    script = tmp_path / "deaf"
    script.write_text(f"trap '' TERM\ntouch {tmp_path}/ignoring\nexec sleep 600\n")
    return "/bin/sh", str(script)


@pytest.fixture
async def changes(systemd_user: SystemdUser) -> AsyncIterator[Changes]:
    units: list[UnitChange] = []
    connection: list[bool] = []
    async with SystemdManager(
        Scope.USER, pattern=PATTERN, on_change=units.append, on_connection=connection.append
    ) as manager:
        await manager.wait_connected(STARTS)
        yield manager, units, connection


@pytest.fixture
async def cuttable(systemd_user: SystemdUser, tmp_path: Path) -> AsyncIterator[Cuttable]:
    """A manager whose connection can be cut while systemd is at work: its bus killed then, systemd 252 may stall."""
    async with (
        CuttableBus(systemd_user.bus_address, tmp_path / "bus") as bus,
        SystemdManager(Scope.USER, pattern=PATTERN, address=bus.address) as manager,
    ):
        await manager.wait_connected(STARTS)
        yield manager, bus


def state(manager: SystemdManager, name: str) -> str | None:
    unit = manager.get(name)
    return unit.active_state if unit else None


def known(manager: SystemdManager, name: str) -> UnitStatus:
    unit = manager.get(name)
    assert unit is not None
    return unit


def ended(unit: UnitStatus) -> UnitStatus:
    """The unit without what goes last: its control group, which systemd does not tell, and its job."""
    return replace(unit, control_group="", job_id=None)


def alive(pid: str) -> bool:
    return Path("/proc", pid).exists()


def command_line(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def kernel_boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kill_bus() -> None:
    systemctl("kill", "--signal=KILL", "dbus.service")


pytestmark = pytest.mark.usefixtures("systemd_user")


class TestStart:
    async def test_ends_with_the_program_executed(self, manager: SystemdManager, unit_name: MakeName) -> None:
        name = unit_name()

        assert await manager.start_transient(service(name), limit=STARTS) is JobResult.DONE

        unit = known(manager, name)
        assert (unit.active_state, unit.sub_state, unit.load_state) == ("active", "running", "loaded")
        assert unit.argv == ("/usr/bin/sleep", "600")
        assert command_line(unit.main_pid) == ["/usr/bin/sleep", "600"]
        assert unit.control_group == shown(name, "ControlGroup")
        assert unit.invocation_id == shown(name, "InvocationID")
        assert unit.exec_main_status is None

    async def test_of_a_program_that_does_not_exist_fails_with_203(
        self, manager: SystemdManager, unit_name: MakeName
    ) -> None:
        name = unit_name()

        assert await manager.start_transient(service(name, "/nonexistent"), limit=STARTS) is JobResult.FAILED

        unit = known(manager, name)
        assert (unit.active_state, unit.result) == ("failed", "exit-code")
        assert (unit.exec_main_code, unit.exec_main_status) == (1, 203)

    async def test_of_a_name_that_runs_is_refused(self, manager: SystemdManager, unit_name: MakeName) -> None:
        name = unit_name()
        await manager.start_transient(service(name), limit=STARTS)

        with pytest.raises(UnitExists):
            await manager.start_transient(service(name), limit=STARTS)

    async def test_of_a_name_that_failed_is_refused_until_the_failure_is_reset(
        self, manager: SystemdManager, unit_name: MakeName
    ) -> None:
        name = unit_name()
        await manager.start_transient(service(name, "/bin/false"), limit=STARTS)
        await until(lambda: state(manager, name) == "failed", "it failed")

        unit = known(manager, name)
        assert (unit.result, unit.exec_main_code, unit.exec_main_status) == ("exit-code", 1, 1)
        with pytest.raises(UnitExists):
            await manager.start_transient(service(name), limit=STARTS)
        await manager.reset_failed(name)
        assert manager.get(name) is None
        assert await manager.start_transient(service(name), limit=STARTS) is JobResult.DONE

    async def test_of_what_systemd_does_not_take_tells_its_reason(
        self, manager: SystemdManager, unit_name: MakeName
    ) -> None:
        with pytest.raises(BusCallFailed, match="CPUWeight"):
            await manager.start_transient(service(unit_name(), cpu_weight=1_000_000), limit=STARTS)

    async def test_of_many_at_once_gives_each_its_own_result(
        self, manager: SystemdManager, unit_name: MakeName
    ) -> None:
        units = [service(unit_name(), program, "600") for program in ("/bin/sleep", "/nonexistent") * 10]

        results = await asyncio.gather(*(manager.start_transient(unit, limit=60) for unit in units))

        assert results == [JobResult.DONE, JobResult.FAILED] * 10
        assert {unit.name for unit in units} <= manager.units.keys()

    async def test_that_takes_too_long_is_given_up(self, manager: SystemdManager, unit_name: MakeName) -> None:
        holder, held = unit_name("holder"), unit_name("held")
        run(
            *("systemd-run", "--user", "--quiet", "--no-block", f"--unit={holder}", f"--property=Before={held}"),
            *("--property=Type=oneshot", "sleep", "60"),
        )
        await until(lambda: state(manager, holder) == "activating", "the one before it is starting")

        with pytest.raises(JobTimeout, match=r"StartTransientUnit did not end within 0\.2 s"):
            await manager.start_transient(service(held), limit=0.2)

    async def test_again_after_a_crash_is_systemds_and_is_counted(
        self, manager: SystemdManager, unit_name: MakeName
    ) -> None:
        name = unit_name()
        await manager.start_transient(service(name, restart=Restart.ON_FAILURE, restart_sec=0.1), limit=STARTS)
        before = known(manager, name)

        systemctl("kill", "--signal=KILL", name)

        await until(lambda: (unit := manager.get(name)) and unit.n_restarts == 1 and unit.main_pid, "a new start")
        await until(lambda: state(manager, name) == "active", "it runs")
        after = known(manager, name)
        assert after.invocation_id == shown(name, "InvocationID") != before.invocation_id
        assert after.main_pid != before.main_pid

    async def test_again_and_again_ends_when_the_limit_is_reached(
        self, manager: SystemdManager, unit_name: MakeName
    ) -> None:
        name = unit_name()
        crashing = service(name, "/bin/false", restart=Restart.ON_FAILURE, restart_sec=0.05, start_limit_burst=3)

        await manager.start_transient(crashing, limit=STARTS)

        # Between two starts it is "failed" for a moment too.
        await until(lambda: (unit := manager.get(name)) and unit.n_restarts == 3, "the third start")
        await until(lambda: state(manager, name) == "failed" and not known(manager, name).job_id, "systemd gave up")
        assert known(manager, name).result == "exit-code"


class TestStop:
    async def test_ends_the_processes_and_unloads_the_unit(self, manager: SystemdManager, unit_name: MakeName) -> None:
        name = unit_name()
        await manager.start_transient(service(name), limit=STARTS)
        pid = shown(name, "MainPID")

        assert await manager.stop(name, limit=STARTS) is JobResult.DONE

        # systemd tells of the end a moment before it lets go of the process.
        await until(lambda: not alive(pid), "the process is gone")
        await until(lambda: manager.get(name) is None, "the unit is unloaded")

    async def test_of_what_is_not_there_is_a_typed_error(self, manager: SystemdManager, unit_name: MakeName) -> None:
        with pytest.raises(NoSuchUnit):
            await manager.stop(unit_name(), limit=STARTS)

    async def test_kills_what_ignores_sigterm(
        self, manager: SystemdManager, unit_name: MakeName, deaf: tuple[str, str], tmp_path: Path
    ) -> None:
        name = unit_name()
        unit = service(name, *deaf, timeout_stop_sec=0.3, kill_mode=KillMode.MIXED)
        await manager.start_transient(unit, limit=STARTS)
        await until((tmp_path / "ignoring").exists, "it ignores SIGTERM")
        pid = shown(name, "MainPID")

        assert await manager.stop(name, limit=STARTS) is JobResult.DONE

        # systemd tells of the end a moment before it lets go of the process.
        await until(lambda: not alive(pid), "the process is gone")
        after = known(manager, name)
        assert (after.active_state, after.result) == ("failed", "timeout")
        assert (after.exec_main_code, after.exec_main_status) == (2, signal.SIGKILL)

    async def test_that_takes_too_long_is_given_up(
        self, manager: SystemdManager, unit_name: MakeName, deaf: tuple[str, str], tmp_path: Path
    ) -> None:
        name = unit_name()
        await manager.start_transient(service(name, *deaf, timeout_stop_sec=60), limit=STARTS)
        await until((tmp_path / "ignoring").exists, "it ignores SIGTERM")

        with pytest.raises(JobTimeout, match="StopUnit"):
            await manager.stop(name, limit=0.2)

        assert known(manager, name).active_state == "deactivating"
        assert known(manager, name).job_id is not None


class TestFollowing:
    async def test_sees_what_others_start_and_stop(self, changes: Changes, unit_name: MakeName) -> None:
        manager, told, _ = changes
        name = unit_name()

        await asyncio.to_thread(run, "systemd-run", "--user", "--quiet", f"--unit={name}", "sleep", "600")
        await until(lambda: state(manager, name) == "active", "it is seen to run")
        pid = known(manager, name).main_pid
        await asyncio.to_thread(systemctl, "stop", name)
        await until(lambda: manager.get(name) is None, "it is seen to be gone")

        assert pid is not None
        mine = [change for change in told if change.name == name]
        assert mine[0].before is None
        assert mine[-1].after is None
        assert all(earlier.after == later.before for earlier, later in itertools.pairwise(mine))

    async def test_sees_how_a_unit_ended(self, manager: SystemdManager, unit_name: MakeName) -> None:
        name = unit_name()
        await manager.start_transient(service(name), limit=STARTS)

        os.kill(known(manager, name).main_pid or 0, signal.SIGKILL)

        await until(lambda: state(manager, name) == "failed", "it failed")
        unit = known(manager, name)
        assert (unit.result, unit.exec_main_code, unit.exec_main_status) == ("signal", 2, signal.SIGKILL)
        assert unit.main_pid is None

    async def test_ignores_units_of_other_names(self, manager: SystemdManager) -> None:
        assert "dbus.service" not in manager.units

        assert await manager.refresh("dbus.service") is not None

    async def test_finds_at_the_start_what_runs_already(self, manager: SystemdManager, unit_name: MakeName) -> None:
        runs, failed = unit_name(), unit_name()
        await manager.start_transient(service(runs), limit=STARTS)
        await manager.start_transient(service(failed, "/nonexistent"), limit=STARTS)

        async with SystemdManager(Scope.USER, pattern=PATTERN) as other:
            await other.wait_connected(STARTS)

            assert known(other, runs) == known(manager, runs)
            assert ended(known(other, failed)) == ended(known(manager, failed))

    async def test_reads_a_unit_that_is_not_there_as_none(self, manager: SystemdManager, unit_name: MakeName) -> None:
        name = unit_name()

        assert await manager.refresh(name) is None

        assert systemctl("list-units", "--all", "--no-legend", name) == ""

    async def test_compares_once_in_a_while(self, unit_name: MakeName, monkeypatch: pytest.MonkeyPatch) -> None:
        name = unit_name()
        async with SystemdManager(Scope.USER, pattern=PATTERN, check_interval=0.1) as manager:
            await manager.wait_connected(STARTS)
            await manager.start_transient(service(name), limit=STARTS)
            # As if the signals of its end had been lost.
            monkeypatch.setattr(manager._table, "take", lambda _: None)
            await asyncio.to_thread(systemctl, "stop", name)

            await until(lambda: manager.get(name) is None, "the comparison finds it gone")

    async def test_tells_what_a_unit_uses(self, manager: SystemdManager, unit_name: MakeName) -> None:
        name = unit_name()
        await manager.start_transient(service(name), limit=STARTS)

        accounting = await manager.read_accounting(name)

        # What there is depends on the controllers of the machine; "not set" is never a number.
        for figure in (accounting.memory_current, accounting.cpu_usage_nsec, accounting.tasks_current):
            assert figure is None or 0 <= figure < 2**60
        with pytest.raises(NoSuchUnit):
            await manager.read_accounting("systemdtest-none.service")


class TestReload:
    @pytest.mark.parametrize("verb", ["daemon-reload", "daemon-reexec"])
    async def test_of_systemd_loses_nothing(self, changes: Changes, unit_name: MakeName, verb: str) -> None:
        manager, told, connection = changes
        runs, failed = unit_name(), unit_name()
        await manager.start_transient(service(runs), limit=STARTS)
        await manager.start_transient(service(failed, "/nonexistent"), limit=STARTS)
        before = {name: known(manager, name) for name in (runs, failed)}
        told.clear()

        await asyncio.to_thread(systemctl, verb)

        if verb == "daemon-reexec":
            await until(lambda: connection == [True, False, True], "the new process image is followed")
        assert asdict(known(manager, runs)) == asdict(before[runs])
        assert asdict(ended(known(manager, failed))) == asdict(ended(before[failed]))
        assert not [change for change in told if change.after is None], "no unit was seen to go"
        assert await manager.refresh(runs) == before[runs]

    @pytest.mark.parametrize("verb", ["daemon-reload", "daemon-reexec"])
    async def test_of_systemd_leaves_signals_coming(
        self, manager: SystemdManager, unit_name: MakeName, verb: str
    ) -> None:
        early, late = unit_name(), unit_name()
        await manager.start_transient(service(early), limit=STARTS)

        await asyncio.to_thread(systemctl, verb)

        await asyncio.to_thread(run, "systemd-run", "--user", "--quiet", f"--unit={late}", "sleep", "600")
        await asyncio.to_thread(systemctl, "stop", early)
        await until(lambda: state(manager, late) == "active", "what started after it")
        await until(lambda: manager.get(early) is None, "what stopped after it")

    async def test_of_systemd_that_forgets_a_unit_is_seen(
        self, manager: SystemdManager, systemd_user: SystemdUser, unit_name: MakeName
    ) -> None:
        # A unit that does not run is loaded as long as another names it.
        names, named = unit_name("names"), unit_name("named")
        folder = systemd_user.runtime / "systemd" / "user"
        file = folder / names
        (folder / named).write_text("[Service]\nExecStart=sleep 600\n")
        try:
            file.write_text(f"[Unit]\nAfter={named}\n[Service]\nExecStart=sleep 600\n")
            systemctl("daemon-reload")
            systemctl("start", names)
            await until(lambda: state(manager, named) == "inactive", "it is loaded")

            file.write_text("[Service]\nExecStart=sleep 600\n")
            await asyncio.to_thread(systemctl, "daemon-reload")

            await until(lambda: manager.get(named) is None, "it is not loaded any more")
        finally:
            file.unlink()
            (folder / named).unlink()

    async def test_in_the_middle_of_starts_loses_no_result(self, manager: SystemdManager, unit_name: MakeName) -> None:
        units = [service(unit_name(), program, "600") for program in ("/bin/sleep", "/nonexistent") * 5]
        starts = [asyncio.create_task(manager.start_transient(unit, limit=60)) for unit in units]

        await asyncio.to_thread(systemctl, "daemon-reload")

        assert await asyncio.gather(*starts) == [JobResult.DONE, JobResult.FAILED] * 5


class TestReconnect:
    async def test_reads_everything_again(self, changes: Changes, unit_name: MakeName) -> None:
        manager, _, connection = changes
        stays, goes, comes = unit_name(), unit_name(), unit_name()
        await manager.start_transient(service(stays), limit=STARTS)
        await manager.start_transient(service(goes), limit=STARTS)
        before = known(manager, stays)

        systemctl("stop", "dbus.socket", "dbus.service")
        try:
            await until(lambda: not manager.connected, "the cut is noticed")
            assert manager.get(stays) == before, "what was known last"
            with pytest.raises(BusDisconnected):
                await manager.start_transient(service(unit_name()), limit=STARTS)
            with pytest.raises(BusTimeout):
                await manager.wait_connected(0.05)
            # systemctl needs no bus.
            systemctl("stop", goes)
            run("systemd-run", "--user", "--quiet", "--no-block", f"--unit={comes}", "sleep", "600")
        finally:
            systemctl("start", "dbus.socket")
        await manager.wait_connected(STARTS)

        assert manager.get(stays) == before
        assert manager.get(goes) is None
        assert known(manager, comes).active_state == "active"
        assert connection == [True, False, True]

    async def test_follows_again(self, manager: SystemdManager, unit_name: MakeName) -> None:
        first, second = unit_name(), unit_name()
        await manager.start_transient(service(first), limit=STARTS)

        kill_bus()
        await until(lambda: not manager.connected, "the cut is noticed")
        await manager.wait_connected(STARTS)

        assert await manager.start_transient(service(second), limit=STARTS) is JobResult.DONE
        await asyncio.to_thread(systemctl, "stop", first)
        await until(lambda: manager.get(first) is None, "the stop is seen")

    async def test_fails_who_waits_for_a_job(
        self, cuttable: Cuttable, unit_name: MakeName, deaf: tuple[str, str], tmp_path: Path
    ) -> None:
        manager, bus = cuttable
        name = unit_name()
        await manager.start_transient(service(name, *deaf, timeout_stop_sec=60), limit=STARTS)
        await until((tmp_path / "ignoring").exists, "it ignores SIGTERM")
        stop = asyncio.create_task(manager.stop(name, limit=60))
        await until(lambda: state(manager, name) == "deactivating", "the stop has begun")

        bus.cut()

        with pytest.raises(BusDisconnected):
            await stop

    async def test_goes_on_however_often_the_connection_ends(self, cuttable: Cuttable, unit_name: MakeName) -> None:
        manager, bus = cuttable
        names = []
        for _ in range(5):
            names.append(unit_name())
            await manager.wait_connected(STARTS)
            await manager.start_transient(service(names[-1]), limit=STARTS)
            bus.cut()
            await until(lambda: not manager.connected, "the cut is noticed")
        await manager.wait_connected(STARTS)

        assert all(state(manager, name) == "active" for name in names)

    async def test_starts_before_the_bus_is_there(self) -> None:
        systemctl("stop", "dbus.socket", "dbus.service")
        try:
            async with SystemdManager(Scope.USER, pattern=PATTERN) as manager:
                with pytest.raises(BusTimeout):
                    await manager.wait_connected(0.2)
                with pytest.raises(BusDisconnected):
                    manager.version()
                systemctl("start", "dbus.socket")
                await manager.wait_connected(STARTS)
                assert manager.version() > 0
        finally:
            systemctl("start", "dbus.socket")

    async def test_after_a_defect_in_a_callback_starts_over_and_tells(self, unit_name: MakeName) -> None:
        crashes: list[Exception] = []
        failing = True

        def fail(change: UnitChange) -> None:
            nonlocal failing
            if failing and change.after is not None:
                failing = False
                raise RuntimeError("a defect")

        name = unit_name()
        async with SystemdManager(Scope.USER, pattern=PATTERN, on_change=fail, on_crash=crashes.append) as manager:
            await manager.wait_connected(STARTS)
            await asyncio.to_thread(run, "systemd-run", "--user", "--quiet", f"--unit={name}", "sleep", "600")
            await until(lambda: crashes, "the crash is told")
            await manager.wait_connected(STARTS)

            assert [str(error) for error in crashes] == ["a defect"]
            await until(lambda: state(manager, name) == "active", "the unit is known nevertheless")

    async def test_leaves_no_socket_open(self, manager: SystemdManager) -> None:
        def open_files() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        before = open_files()
        for _ in range(3):
            kill_bus()
            await until(lambda: not manager.connected, "the cut is noticed")
            await manager.wait_connected(STARTS)

        assert open_files() == before


class TestLife:
    async def test_of_the_manager_has_a_name_that_outlives_reloads(self, changes: Changes) -> None:
        manager, _, connection = changes
        first = await manager.boot_id()

        await asyncio.to_thread(systemctl, "daemon-reload")
        assert await manager.boot_id() == first
        await asyncio.to_thread(systemctl, "daemon-reexec")
        await until(lambda: connection == [True, False, True], "the new process image is followed")
        assert await manager.boot_id() == first
        assert first.startswith(kernel_boot_id())

    async def test_of_another_manager_has_another_name(self, manager: SystemdManager) -> None:
        ask = "async with SystemdManager(Scope.USER) as m: await m.wait_connected(20); print(await m.boot_id())"
        other = (await asyncio.to_thread(run, *WRAPPER, sys.executable, "-c", program(ask))).stdout.strip()

        assert re.fullmatch(r"[0-9a-f-]{36}-\d+", other)
        assert other != await manager.boot_id()

    async def test_that_ends_is_seen(self, manager: SystemdManager, tmp_path: Path) -> None:
        assert not await manager.is_stopping()

        # What holds up the end of the other manager ends before its bus does.
        slow = "trap '' TERM; while :; do sleep 0.1; done"
        (tmp_path / "ask.py").write_text(program(WAITS_FOR_THE_END))
        script = (
            f'systemd-run --user --quiet -p After=dbus.service -p TimeoutStopSec=20 sh -c "{slow}"\n'
            f"exec {sys.executable} {tmp_path}/ask.py"
        )
        ended = await asyncio.to_thread(run, *WRAPPER, "bash", "-c", script)

        assert ended.stdout.split() == ["False", "True"]

    async def test_without_a_connection_is_not_known(self, tmp_path: Path) -> None:
        async with SystemdManager(Scope.USER, address=f"unix:path={tmp_path}/none") as manager:
            with pytest.raises(BusError):
                await manager.boot_id()
            with pytest.raises(BusError):
                await manager.is_stopping()


def program(body: str) -> str:
    lines = body.strip("\n").replace("\n", "\n    ")
    return (
        "import asyncio, subprocess, sys\n"
        f"sys.path.insert(0, {str(locations.CHECKOUT)!r})\n"
        "from magi_agent.systemd.manager import SystemdManager\n"
        "from magi_agent.vocabulary import Scope\n"
        f"async def main():\n    {lines}\n"
        "asyncio.run(main())\n"
    )


WAITS_FOR_THE_END = """
async with SystemdManager(Scope.USER) as manager:
    await manager.wait_connected(20)
    print(await manager.is_stopping())
    subprocess.run(["systemctl", "--user", "start", "--no-block", "exit.target"], check=True)
    async with asyncio.timeout(10):
        while not await manager.is_stopping():
            await asyncio.sleep(0.01)
    print(True)
"""


@pytest.mark.parametrize(
    ("text", "number"),
    [("252.39-1~deb12u1", 252), ("v257-rc1", 257), ("257.13-1~deb13u1", 257), ("255", 255), ("unknown", 0), ("", 0)],
)
def test_the_version_is_read_from_systemds_own_text(text: str, number: int) -> None:
    assert major_version(text) == number


def test_job_results_that_are_new_to_us_are_no_success() -> None:
    assert JobResult("invented") is JobResult.OTHER
    assert not JobResult("invented").ok
    assert [result for result in JobResult if result.ok] == [JobResult.DONE, JobResult.SKIPPED]
