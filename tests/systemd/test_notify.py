"""What is told to the service manager: as datagrams, and as a real manager understands it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import locations
import pytest

from magi_agent.systemd.notify import Notifier, Watchdog
from tests.systemd.units import MakeName, run, shown, systemctl, until

WATCHDOG_SECONDS = 1.5


class Manager:
    """The receiving end, as a service manager has it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.setblocking(False)
        self._received: list[str] = []

    def environment(self, **more: str) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, **more}

    def received(self) -> list[str]:
        """All that has come, from the beginning."""
        while True:
            try:
                self._received.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return self._received


@pytest.fixture
def manager_socket(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


@pytest.fixture
def notifier(manager_socket: Manager) -> Iterator[Notifier]:
    notifier = Notifier(manager_socket.environment(WATCHDOG_USEC="40000", WATCHDOG_PID=str(os.getpid())))
    yield notifier
    notifier.close()


def test_each_word_is_the_protocols(notifier: Notifier, manager_socket: Manager) -> None:
    notifier.ready()
    notifier.ready("serving 3 models")
    notifier.status("loading")
    notifier.watchdog()
    notifier.stopping()
    notifier.stopping("saving")
    notifier.extend_timeout(2.5)
    notifier.reloading()

    *messages, reloading = manager_socket.received()
    assert messages == [
        "READY=1",
        "READY=1\nSTATUS=serving 3 models",
        "STATUS=loading",
        "WATCHDOG=1",
        "STOPPING=1",
        "STOPPING=1\nSTATUS=saving",
        "EXTEND_TIMEOUT_USEC=2500000",
    ]
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("3 models \u2014 ready \u2192 go", "3 models - ready -> go"),
        ("größe naïve", "grosse naive"),
        ("模型", "??"),
        ("two\nlines\rREADY=1\0\x1b", "two lines READY=1  "),
        ("", ""),
        ("x" * 9000, "x" * 1000),
        ("lone \ud800", "lone  "),
    ],
)
def test_a_status_is_one_line_that_arrives(notifier: Notifier, manager_socket: Manager, text: str, line: str) -> None:
    notifier.ready(text)

    [message] = manager_socket.received()
    assert message == f"READY=1\nSTATUS={line}"


def test_an_abstract_socket_is_one_too() -> None:
    manager = Manager(f"@magi-test-notify-{os.getpid()}")
    notifier = Notifier(manager.environment())

    notifier.ready()

    assert manager.received() == ["READY=1"]
    notifier.close()
    manager.socket.close()


def test_the_variables_are_taken_out(manager_socket: Manager) -> None:
    environment = manager_socket.environment(WATCHDOG_USEC="1", WATCHDOG_PID="1", PATH="/bin")

    Notifier(environment).close()

    assert environment == {"PATH": "/bin"}


def test_the_process_environment_is_read_where_none_is_given(
    manager_socket: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager_socket.address)

    notifier = Notifier()
    notifier.ready()
    notifier.close()

    assert manager_socket.received() == ["READY=1"]
    assert "NOTIFY_SOCKET" not in os.environ


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})

    notifier.ready("up")
    notifier.watchdog()
    notifier.close()

    assert notifier.watchdog_interval is None


@pytest.mark.parametrize("address", ["/nonexistent/socket", "vsock:2:1234", "relative"])
def test_a_manager_that_cannot_be_reached_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture, address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready()
    # A socket left open would be a warning, which is an error here.
    gc.collect()

    assert "cannot be told anything" in caplog.text


def test_a_manager_that_goes_away_is_a_line_in_the_log(
    notifier: Notifier, manager_socket: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    manager_socket.socket.close()

    notifier.watchdog()

    assert "could not be told WATCHDOG=1" in caplog.text


def test_a_manager_that_does_not_read_holds_nobody_up(notifier: Notifier, caplog: pytest.LogCaptureFixture) -> None:
    # The kernel queues net.unix.max_dgram_qlen datagrams.
    for _ in range(10_000):
        notifier.watchdog()
        if caplog.records:
            break

    assert "could not be told WATCHDOG=1: timed out" in caplog.text


def test_after_the_end_nothing_is_said(notifier: Notifier, manager_socket: Manager) -> None:
    notifier.close()
    notifier.close()

    notifier.ready()

    assert manager_socket.received() == []
    assert notifier.watchdog_interval is None


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({}, None),
    ],
)
def test_the_interval_is_the_managers(
    manager_socket: Manager, variables: dict[str, str], interval: float | None
) -> None:
    notifier = Notifier(manager_socket.environment(**variables))

    assert notifier.watchdog_interval == interval
    notifier.close()


async def test_the_watchdog_is_told_as_long_as_all_is_well(notifier: Notifier, manager_socket: Manager) -> None:
    task = asyncio.create_task(Watchdog(notifier, lambda: True).run())

    await until(lambda: len(manager_socket.received()) >= 3, "three signs of life")
    task.cancel()

    assert set(manager_socket.received()) == {"WATCHDOG=1"}


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [(False, "the liveness probe says no"), ("the reconciler sleeps", "the reconciler sleeps"), ("", "says no")],
)
async def test_the_watchdog_is_told_nothing_when_something_is_wrong(
    notifier: Notifier,
    manager_socket: Manager,
    caplog: pytest.LogCaptureFixture,
    verdict: bool | str,
    reason: str,
) -> None:
    asked = 0

    def probe() -> bool | str:
        nonlocal asked
        asked += 1
        return verdict

    task = asyncio.create_task(Watchdog(notifier, probe).run())
    await until(lambda: asked >= 3, "the probe is asked again and again")
    task.cancel()

    [said] = manager_socket.received()
    assert said.startswith("STATUS=Not alive: ")
    assert reason in said
    assert len(caplog.records) == 1
    assert reason in caplog.text


async def test_the_watchdog_outlives_a_probe_that_fails_and_hears_the_next_answer(
    notifier: Notifier, manager_socket: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 3

    def probe() -> bool:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RuntimeError("a defect")
        return True

    task = asyncio.create_task(Watchdog(notifier, probe).run())
    await until(lambda: "WATCHDOG=1" in manager_socket.received(), "a sign of life")
    task.cancel()

    assert "a defect" in caplog.text
    assert "alive again" in caplog.text
    assert manager_socket.received()[0].startswith("STATUS=Not alive")


async def test_the_watchdog_is_done_where_nobody_wants_to_know(manager_socket: Manager) -> None:
    notifier = Notifier(manager_socket.environment())

    async with asyncio.timeout(5):
        await Watchdog(notifier, lambda: True).run()

    notifier.close()
    assert manager_socket.received() == []


class TestRealManager:
    """A unit of `Type=notify` that does as it is told over a connection."""

    PROGRAM = f"""
import asyncio, sys, time
sys.path.insert(0, {str(locations.CHECKOUT)!r})
from magi_agent.systemd.notify import Notifier, Watchdog

alive = True

async def main():
    global alive
    notifier = Notifier()
    watchdog = asyncio.create_task(Watchdog(notifier, lambda: alive or "told to be ill").run())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    while line := (await reader.readline()).decode():
        word, _, text = line.strip().partition(" ")
        if word == "ill":
            alive = False
        elif word == "stuck":
            time.sleep(600)
        else:
            getattr(notifier, word)(*([text] if text else []))
        writer.write(b"done")

asyncio.run(main())
"""

    @pytest.fixture
    async def unit(self, unit_name: MakeName, tmp_path: Path) -> AsyncIterator[Unit]:
        connected: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.set_result(writer)
            await reader.read()
            writer.close()

        script = tmp_path / "service.py"
        script.write_text(self.PROGRAM)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            async with await asyncio.start_server(take, sock=listening):
                name = unit_name("notify")
                await asyncio.to_thread(
                    run,
                    *("systemd-run", "--user", "--quiet", "--no-block", f"--unit={name}", "--property=Type=notify"),
                    *(f"--property=WatchdogSec={WATCHDOG_SECONDS}", "--property=LimitCORE=0"),
                    *(sys.executable, str(script), str(listening.getsockname()[1])),
                )
                async with asyncio.timeout(20):
                    writer = await connected
                yield Unit(name, writer)
                systemctl("kill", "--signal=KILL", name, check=False)
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    async def test_understands_ready_status_reloading_and_stopping(self, unit: Unit) -> None:
        assert unit.state == "activating"

        unit.tell("ready 3 models \u2014 ready")
        await until(lambda: unit.state == "active", "it is ready")
        assert shown(unit.name, "StatusText") == "3 models - ready"
        unit.tell("status größer")
        await until(lambda: shown(unit.name, "StatusText") == "grosser", "the status")
        unit.tell("reloading")
        await until(lambda: unit.state == "reloading", "it reloads")
        unit.tell("ready")
        await until(lambda: unit.state == "active", "it has reloaded")
        unit.tell("stopping")
        await until(lambda: unit.state == "deactivating", "it stops")

    @pytest.mark.parametrize("trouble", ["ill", "stuck"])
    async def test_ends_what_says_nothing_any_more(self, unit: Unit, trouble: str) -> None:
        unit.tell("ready")
        await until(lambda: unit.state == "active", "it is ready")
        for _ in range(3):
            before = unit.last_sign
            await until(lambda: unit.last_sign != before, "a sign of life")  # noqa: B023  # used in this turn only
        assert unit.state == "active"

        unit.tell(trouble)

        await until(lambda: unit.state == "failed", "the manager ends it")
        assert shown(unit.name, "Result") == "watchdog"
        assert shown(unit.name, "ExecMainStatus") == "6", "SIGABRT"


class Unit:
    def __init__(self, name: str, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self._writer = writer

    @property
    def state(self) -> str:
        return shown(self.name, "ActiveState")

    @property
    def last_sign(self) -> str:
        """When it said last that it is alive."""
        return shown(self.name, "WatchdogTimestampMonotonic")

    def tell(self, line: str) -> None:
        self._writer.write(f"{line}\n".encode())
