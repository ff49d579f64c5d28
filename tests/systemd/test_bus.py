"""The connection to the message bus, against a real bus that answers, hangs, dies and refuses."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from magi_agent.systemd.bus import CALLS_IN_FLIGHT, DBUS_NAME, DBUS_PATH, Bus, Signal, address_of
from magi_agent.systemd.errors import (
    AccessDenied,
    BusCallFailed,
    BusDisconnected,
    BusError,
    BusTimeout,
    NoSuchUnit,
    call_error,
)
from magi_agent.systemd.unit_table import MANAGER, MANAGER_PATH, PROPERTIES, SYSTEMD
from magi_agent.vocabulary import Scope
from tests.conftest import SystemdUser
from tests.systemd.units import MakeName, run, shown, systemctl, until

PEER = "org.freedesktop.DBus.Peer"


@pytest.fixture
async def bus(systemd_user: SystemdUser) -> AsyncIterator[Bus]:
    connection = await Bus.connect(Scope.USER)
    yield connection
    connection.close()


@pytest.fixture
async def frozen_bus(bus: Bus) -> AsyncIterator[Bus]:
    """A connection to a bus that takes everything and answers nothing."""
    systemctl("kill", "--signal=STOP", "dbus.service")
    yield bus
    systemctl("kill", "--signal=CONT", "dbus.service", check=False)


async def ping(bus: Bus, seconds: float = 20.0) -> None:
    await bus.call(DBUS_NAME, DBUS_PATH, PEER, "Ping", limit=seconds)


def kill_bus() -> None:
    systemctl("kill", "--signal=KILL", "dbus.service")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestAddress:
    def test_of_the_user_bus_as_the_environment_says(self) -> None:
        environment = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/elsewhere", "XDG_RUNTIME_DIR": "/run/user/7"}
        assert address_of(Scope.USER, environment) == "unix:path=/elsewhere"

    def test_of_the_user_bus_below_the_runtime_folder(self) -> None:
        assert address_of(Scope.USER, {"XDG_RUNTIME_DIR": "/run/user/7"}) == "unix:path=/run/user/7/bus"

    def test_of_the_user_bus_without_any_environment(self) -> None:
        assert address_of(Scope.USER, {}) == f"unix:path=/run/user/{os.getuid()}/bus"

    def test_of_the_system_bus_whatever_the_user_bus_is(self) -> None:
        environment = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/elsewhere"}
        assert address_of(Scope.SYSTEM, environment) == "unix:path=/run/dbus/system_bus_socket"

    def test_of_the_system_bus_as_the_environment_says(self) -> None:
        assert address_of(Scope.SYSTEM, {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"}) == "unix:path=/x"


class TestConnecting:
    async def test_gives_a_name_of_its_own(self, bus: Bus) -> None:
        assert bus.unique_name.startswith(":")
        assert bus.connected

    async def test_where_nothing_listens_is_a_typed_error(self, tmp_path: Path) -> None:
        with pytest.raises(BusDisconnected, match="no message bus at"):
            await Bus.connect(Scope.USER, address=f"unix:path={tmp_path}/none")

    async def test_with_an_address_that_is_none_is_a_typed_error(self) -> None:
        with pytest.raises(BusDisconnected, match="no message bus at"):
            await Bus.connect(Scope.USER, address="nonsense")

    async def test_to_one_that_never_answers_ends_in_time(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / "silent"))
            silent.listen()
            with pytest.raises(BusTimeout):
                await Bus.connect(Scope.USER, address=f"unix:path={tmp_path}/silent", limit=0.2)

    async def test_to_one_that_hangs_up_is_a_typed_error(self, tmp_path: Path) -> None:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_unix_server(hang_up, str(tmp_path / "rude")):
            with pytest.raises(BusDisconnected):
                await Bus.connect(Scope.USER, address=f"unix:path={tmp_path}/rude", limit=20)

    async def test_to_the_private_socket_of_systemd_is_refused(self, systemd_user: SystemdUser) -> None:
        # It answers Hello with an error, whose text dbus-next would take for its name; or not at all.
        with pytest.raises(BusError):
            await Bus.connect(Scope.USER, address=f"unix:path={systemd_user.runtime}/systemd/private", limit=0.5)

    @pytest.mark.usefixtures("systemd_user")
    async def test_to_one_that_refuses_hello_says_why(self, tmp_path: Path) -> None:
        # As the private socket does, whenever it is quick enough.
        hung_up = asyncio.Event()

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while (line := await reader.readline()) and not line.startswith(b"BEGIN"):
                writer.write(b"OK 0123456789abcdef0123456789abcdef\r\n")
            answer = Message(
                message_type=MessageType.ERROR,
                reply_serial=1,
                error_name="org.freedesktop.DBus.Error.UnknownMethod",
                signature="s",
                body=["no such method"],
                serial=1,
            )
            writer.write(answer._marshall())
            await reader.read()
            writer.close()
            hung_up.set()

        async with await asyncio.start_unix_server(refuse, str(tmp_path / "other")):
            with pytest.raises(BusDisconnected, match="refused: no such method"):
                await Bus.connect(Scope.USER, address=f"unix:path={tmp_path}/other", limit=20)
            await until(hung_up.is_set, "the connection is closed")

    async def test_again_and_again_leaves_no_socket_open(self, tmp_path: Path) -> None:
        before = open_files()
        for _ in range(5):
            (await Bus.connect(Scope.USER)).close()
            with pytest.raises(BusDisconnected):
                await Bus.connect(Scope.USER, address=f"unix:path={tmp_path}/none")
        assert open_files() == before

    async def test_cancelled_leaves_no_socket_open(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / "silent"))
            silent.listen()
            before = open_files()
            task = asyncio.create_task(Bus.connect(Scope.USER, address=f"unix:path={tmp_path}/silent"))
            await until(lambda: open_files() > before, "the connection is being made")
            task.cancel()
            await asyncio.wait([task])
            assert open_files() == before


class TestCalls:
    async def test_answer_with_plain_values(self, bus: Bus) -> None:
        [names] = await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "ListNames")
        assert isinstance(names, list)
        assert SYSTEMD in names

    async def test_unwrap_variants(self, bus: Bus) -> None:
        [properties] = await bus.call(SYSTEMD, MANAGER_PATH, PROPERTIES, "GetAll", "s", MANAGER)
        assert isinstance(properties, dict)
        assert isinstance(properties["Version"], str)

    async def test_raise_the_error_that_the_answer_names(self, bus: Bus) -> None:
        with pytest.raises(NoSuchUnit) as raised:
            await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "GetUnit", "s", "systemdtest-none.service")
        assert raised.value.name == "org.freedesktop.systemd1.NoSuchUnit"
        assert "systemdtest-none.service" in raised.value.text
        assert raised.value.details == {"service": "systemd"}

    async def test_raise_a_general_error_for_one_that_has_no_type(self, bus: Bus) -> None:
        with pytest.raises(BusCallFailed) as raised:
            await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "MakeCoffee")
        assert raised.value.name == "org.freedesktop.DBus.Error.UnknownMethod"

    def test_denied_have_a_type_of_their_own(self) -> None:
        # The private manager is our own and denies nothing.
        for name in ("AccessDenied", "InteractiveAuthorizationRequired"):
            assert isinstance(call_error(f"org.freedesktop.DBus.Error.{name}", "no"), AccessDenied)

    @pytest.mark.parametrize(
        ("signature", "arguments"),
        [("s", ()), ("s", ("a", "b")), ("s", (5,)), ("u", ("text",)), ("(ss)", (("one",),)), ("!", ("x",))],
    )
    async def test_with_arguments_that_do_not_fit_are_refused(
        self, bus: Bus, signature: str, arguments: tuple[object, ...]
    ) -> None:
        with pytest.raises(ValueError, match=r"NameHasOwner|signature|members"):
            await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "NameHasOwner", signature, *arguments)
        await ping(bus)

    @pytest.mark.parametrize(
        ("signature", "argument"),
        [("s", "a\0b"), ("as", ["fine", "\0"]), ("(sv)", ("fine", ("s", "\0"))), ("a{ss}", {"\0": "fine"})],
    )
    async def test_with_a_nul_are_refused_and_the_connection_lives_on(
        self, bus: Bus, signature: str, argument: object
    ) -> None:
        with pytest.raises(ValueError, match="NUL"):
            await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "NameHasOwner", signature, argument)
        await ping(bus)

    async def test_that_are_not_answered_end_in_time(self, frozen_bus: Bus) -> None:
        with pytest.raises(BusTimeout, match=r"Ping was not answered within 0\.1 s"):
            await ping(frozen_bus, seconds=0.1)

    async def test_that_wait_for_a_slot_end_in_time_too(self, frozen_bus: Bus) -> None:
        before = [asyncio.create_task(ping(frozen_bus)) for _ in range(CALLS_IN_FLIGHT)]
        await asyncio.sleep(0)
        with pytest.raises(BusTimeout):
            await ping(frozen_bus, seconds=0.1)
        systemctl("kill", "--signal=CONT", "dbus.service")
        await asyncio.gather(*before)

    async def test_after_one_that_was_given_up_get_their_own_answer(self, frozen_bus: Bus) -> None:
        with pytest.raises(BusTimeout):
            await frozen_bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "GetId", limit=0.1)
        systemctl("kill", "--signal=CONT", "dbus.service")
        [has_owner] = await frozen_bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "NameHasOwner", "s", SYSTEMD)
        assert has_owner is True

    async def test_many_and_big_at_once_are_all_answered(self, bus: Bus) -> None:
        # More than the socket's buffer holds: dbus-next by itself gives up the connection then.
        big = ["x" * 200 for _ in range(500)]

        async def ask(number: int) -> int:
            [units] = await bus.call(
                SYSTEMD, MANAGER_PATH, MANAGER, "ListUnitsByPatterns", "asas", [], [*big, f"none-{number}"], limit=60
            )
            assert units == []
            return number

        assert await asyncio.gather(*map(ask, range(100))) == list(range(100))

    async def test_handle_the_answer_when_it_arrives(self, bus: Bus) -> None:
        seen: list[object] = []
        reply = await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "GetId", at_reply=lambda body: seen.append(body))
        assert seen == [reply]

    async def test_whose_handler_fails_end_the_connection(self, bus: Bus) -> None:
        def fail(_: object) -> None:
            raise RuntimeError("a defect")

        with pytest.raises(BusDisconnected):
            await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "GetId", at_reply=fail)
        with pytest.raises(RuntimeError, match="a defect"):
            bus.raise_if_ended()


class TestEnd:
    async def test_fails_the_calls_in_flight(self, frozen_bus: Bus) -> None:
        waiting = asyncio.create_task(ping(frozen_bus))
        await asyncio.sleep(0)
        kill_bus()
        with pytest.raises(BusDisconnected):
            await waiting
        assert not frozen_bus.connected

    async def test_fails_later_calls_at_once(self, bus: Bus) -> None:
        kill_bus()
        await until(lambda: not bus.connected, "the end is noticed")
        with pytest.raises(BusDisconnected):
            await ping(bus)
        with pytest.raises(BusDisconnected):
            bus.raise_if_ended()

    async def test_is_told_once_and_to_who_comes_late(self, bus: Bus) -> None:
        told: list[str] = []
        bus.on_end(lambda: told.append("early"))
        kill_bus()
        await until(lambda: told, "the end is told")
        bus.close()
        bus.on_end(lambda: told.append("late"))
        assert told == ["early", "late"]

    async def test_by_ourselves_fails_the_calls_in_flight(self, frozen_bus: Bus) -> None:
        waiting = asyncio.create_task(ping(frozen_bus))
        await asyncio.sleep(0)
        frozen_bus.close()
        with pytest.raises(BusDisconnected):
            await waiting

    async def test_lets_a_new_connection_be_made(self, bus: Bus) -> None:
        kill_bus()
        await until(lambda: not bus.connected, "the end is noticed")
        again = await Bus.connect(Scope.USER, limit=20)
        await ping(again)
        again.close()


class TestSignals:
    @pytest.fixture
    async def announce(self, bus: Bus, unit_name: MakeName) -> Callable[[], str]:
        """Has systemd send a signal about a new unit; returns the unit's name."""
        await bus.add_match(f"type='signal',interface='{MANAGER}',member='UnitNew'")
        await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe")

        def start() -> str:
            name = unit_name("signal")
            run("systemd-run", "--user", "--quiet", f"--unit={name}", "sleep", "60")
            return name

        return start

    async def test_come_with_their_sender_and_values(self, bus: Bus, announce: Callable[[], str]) -> None:
        seen: list[Signal] = []
        bus.on_signal(seen.append)
        name = await asyncio.to_thread(announce)
        await until(lambda: any(signal.body[:1] == (name,) for signal in seen), "the signal")
        [signal] = [signal for signal in seen if signal.body[:1] == (name,)]
        [owner] = await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "GetNameOwner", "s", SYSTEMD)
        assert (signal.member, signal.interface, signal.path) == ("UnitNew", MANAGER, MANAGER_PATH)
        assert signal.sender == owner

    async def test_whose_handler_fails_end_the_connection(self, bus: Bus, announce: Callable[[], str]) -> None:
        def fail(_: Signal) -> None:
            raise RuntimeError("a defect")

        bus.on_signal(fail)
        await asyncio.to_thread(announce)
        await until(lambda: not bus.connected, "the connection is given up")
        with pytest.raises(RuntimeError, match="a defect"):
            bus.raise_if_ended()

    async def test_of_what_nobody_asked_for_do_not_come(self, bus: Bus, unit_name: MakeName) -> None:
        seen: list[Signal] = []
        bus.on_signal(seen.append)
        name = unit_name("unheard")
        await asyncio.to_thread(run, "systemd-run", "--user", "--quiet", f"--unit={name}", "sleep", "60")
        assert shown(name, "ActiveState") == "active"
        await ping(bus)
        assert not [signal for signal in seen if signal.member == "UnitNew"]
