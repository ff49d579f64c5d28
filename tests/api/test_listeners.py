"""Where the API listens, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import locations
import psutil
import pytest
from aiohttp import web

from magi_agent.api.listeners import Listeners
from magi_agent.errors import ConfigurationError
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import Settings
from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, Answer, unit_property, wait_until
from tests.api.client import until
from tests.conftest import PortRanges, SystemdUser

ACTIVATED = "api-activated"
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def settings(tmp_path: Path, unused_ports: PortRanges) -> Settings:
    port, _ = unused_ports()
    return load_settings({"socket": str(tmp_path / "run" / "deep" / "api.sock"), "tcp": f"127.0.0.1:{port}"}, {})


def application(wait: asyncio.Event | None = None) -> web.Application:
    """An application that needs no agent behind it; its answers wait for an event."""

    async def answer(_: web.Request) -> web.Response:
        if wait is not None:
            await wait.wait()
        return web.Response(text="here")

    made = web.Application()
    made.router.add_get("/", answer)
    return made


@asynccontextmanager
async def listening(settings: Settings, served: web.Application | None = None) -> AsyncIterator[Listeners]:
    listeners = Listeners(served or application(), settings, {})
    await listeners.start()
    try:
        yield listeners
    finally:
        await listeners.stop()


async def refusal(settings: Settings) -> str:
    """What a start that must not succeed says."""
    with pytest.raises(ConfigurationError) as caught:
        await Listeners(application(), settings, {}).start()
    return str(caught.value)


async def answers_on_unix(path: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    return await answers(reader, writer)


async def answers_on_tcp(settings: Settings) -> bool:
    assert settings.tcp is not None
    try:
        reader, writer = await asyncio.open_connection(settings.tcp.host, settings.tcp.port)
    except OSError:
        return False
    return await answers(reader, writer)


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    try:
        writer.write(REQUEST)
        async with asyncio.timeout(30):
            return (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False
    finally:
        writer.close()


async def test_both_listen_and_nothing_is_left_of_them(settings: Settings) -> None:
    assert settings.socket is not None
    async with listening(settings) as listeners:
        assert listeners.addresses == (f"unix:{settings.socket}", f"http://{settings.tcp}")
        found = settings.socket.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert await answers_on_unix(settings.socket)
        assert await answers_on_tcp(settings)
    assert not settings.socket.exists()
    assert settings.socket.parent.exists()
    assert not await answers_on_tcp(settings)


@pytest.mark.parametrize("off", ["socket", "tcp"])
async def test_either_may_be_off(tmp_path: Path, unused_ports: PortRanges, off: str) -> None:
    port, _ = unused_ports()
    chosen = {"socket": str(tmp_path / "api.sock"), "tcp": f"127.0.0.1:{port}", off: "off"}
    async with listening(load_settings(chosen, {})) as listeners:
        assert len(listeners.addresses) == 1
        assert (tmp_path / "api.sock").exists() is (off == "tcp")


async def test_a_mode_of_the_process_takes_nothing_from_the_sockets(settings: Settings) -> None:
    assert settings.socket is not None
    before = os.umask(0o077)
    try:
        async with listening(settings):
            assert stat.S_IMODE(settings.socket.stat().st_mode) == 0o660
    finally:
        os.umask(before)


async def test_the_socket_of_a_dead_agent_is_replaced(settings: Settings) -> None:
    assert settings.socket is not None
    settings.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(settings.socket))
        dead.listen()
    assert settings.socket.exists()
    assert not await answers_on_unix(settings.socket)
    async with listening(settings):
        assert await answers_on_unix(settings.socket)


async def test_the_socket_of_a_live_program_is_left_to_it(settings: Settings) -> None:
    assert settings.socket is not None
    settings.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(settings.socket))
        alive.listen()
        said = await refusal(settings)
        assert settings.socket.exists()
    assert said.startswith("api.socket (MAGI_SOCKET): another program answers on ")
    assert not await answers_on_tcp(settings)


async def test_the_socket_of_a_live_program_that_is_too_busy_to_answer_is_left_to_it(settings: Settings) -> None:
    assert settings.socket is not None
    settings.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as callers:
        busy.bind(str(settings.socket))
        busy.listen(0)
        for _ in range(2):
            caller = callers.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.connect(str(settings.socket))
        assert "another program answers on" in await refusal(settings)
        assert settings.socket.exists()


async def test_a_file_that_is_no_socket_is_not_removed(settings: Settings) -> None:
    assert settings.socket is not None
    settings.socket.parent.mkdir(parents=True)
    settings.socket.write_text("precious")

    assert "is there and is no socket" in await refusal(settings)
    assert settings.socket.read_text() == "precious"


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = load_settings({"socket": str(tmp_path / "file" / "api.sock"), "tcp": "off"}, {})

    said = await refusal(settings)

    assert said.startswith(f"api.socket (MAGI_SOCKET): cannot listen on {tmp_path}/file/api.sock: ")


async def test_a_port_that_is_taken(settings: Settings) -> None:
    assert settings.tcp is not None
    assert settings.socket is not None
    with socket.create_server((settings.tcp.host, settings.tcp.port)):
        said = await refusal(settings)
    assert said.startswith(f"api.tcp (MAGI_TCP): cannot listen on {settings.tcp}: another program listens there")
    assert not settings.socket.exists(), "what was open already is closed and removed"


async def test_a_socket_file_that_is_another_agents_by_now_is_not_removed(settings: Settings) -> None:
    assert settings.socket is not None
    async with listening(settings):
        settings.socket.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(settings.socket))
    assert settings.socket.exists()


async def has_begun(listeners: Listeners) -> bool:
    """Whether a request is being answered."""
    assert listeners._runner is not None
    assert listeners._runner.server is not None
    return bool(listeners._runner.server.requests_count)


async def test_requests_under_way_end_and_no_new_ones_begin(settings: Settings) -> None:
    assert settings.socket is not None
    go_on = asyncio.Event()
    listeners = Listeners(application(go_on), settings, {})
    await listeners.start()
    reader, writer = await asyncio.open_unix_connection(str(settings.socket))
    idle_reader, idle_writer = await asyncio.open_unix_connection(str(settings.socket))
    writer.write(REQUEST)
    await writer.drain()
    await until(lambda: has_begun(listeners), "the request has begun")
    path = settings.socket

    async def is_closed() -> bool:
        return not path.exists()

    stopping = asyncio.create_task(listeners.stop())
    await until(is_closed, "the socket is closed")
    assert not await answers_on_tcp(settings)
    assert not stopping.done()
    go_on.set()

    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    await stopping
    assert await idle_reader.read() == b""
    writer.close()
    idle_writer.close()


async def test_a_request_that_does_not_end_is_cut_off(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.socket is not None
    monkeypatch.setattr("magi_agent.api.listeners._END_OF_REQUESTS", 0.2)
    listeners = Listeners(application(asyncio.Event()), settings, {})
    await listeners.start()
    reader, writer = await asyncio.open_unix_connection(str(settings.socket))
    writer.write(REQUEST)
    await writer.drain()
    await until(lambda: has_begun(listeners), "the request has begun")

    async with asyncio.timeout(30):
        await listeners.stop()
        assert await reader.read() == b""
    writer.close()


async def test_one_connection_too_many_is_closed_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.socket is not None
    monkeypatch.setattr("magi_agent.api.listeners._MOST_CONNECTIONS", 2)
    async with listening(settings):
        kept = [await asyncio.open_unix_connection(str(settings.socket)) for _ in range(2)]
        for reader, writer in kept:
            writer.write(REQUEST)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

        reader, writer = await asyncio.open_unix_connection(str(settings.socket))

        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()
        kept[0][1].close()
        await kept[0][1].wait_closed()
        path = settings.socket
        await until(lambda: answers_on_unix(path), "there is room again")
        kept[1][1].close()


async def test_stopping_twice_or_before_the_start_does_nothing(settings: Settings) -> None:
    listeners = Listeners(application(), settings, {})
    await listeners.stop()
    await listeners.start()
    await listeners.stop()
    await listeners.stop()


class ActivatedAgent(AgentProcess):
    """An agent that systemd starts, with sockets that systemd made."""

    handed_over: Path

    @property
    def socket(self) -> Path:
        return self.handed_over


@pytest.fixture
def activated(
    systemd_user: SystemdUser, tmp_path: Path, unused_ports: PortRanges, llama_server: Path
) -> Iterator[tuple[ActivatedAgent, int]]:
    """An agent's socket unit, on a unix socket and on all addresses of a port; the agent itself is not started yet."""
    (tmp_path / "models").mkdir()
    # Without any token, an agent does not start on addresses that other hosts reach.
    (tmp_path / "tokens").write_text(f"{line_of(Token('any', TokenScope.READ, digest_of(new_secret())))}\n")
    agent = ActivatedAgent(tmp_path, tmp_path / "models", unused_ports(4), llama_server)
    agent.handed_over = tmp_path / "systemd.sock"
    port, _ = unused_ports()
    own, _ = unused_ports()
    agent.settings = {
        "MAGI_TCP": f"127.0.0.1:{own}",
        "MAGI_SOCKET": str(tmp_path / "own.sock"),
        "MAGI_TCP_ACCESS": "full",
    }
    given = agent.environment()
    kept = [name for name in given if name.startswith(("MAGI_", "XDG_", "DBUS_"))]
    kept += ["MODEL_SCAN_PATH", "REGISTRY_PATH", "PROFILES_PATH", "LLAMA_SERVER_PATH", "ACTIVE_PROFILE", "PATH"]
    subprocess.run(
        ["systemd-run", "--user", "--quiet", f"--unit={ACTIVATED}", "--property=Type=notify",
         f"--socket-property=ListenStream={agent.handed_over}", f"--socket-property=ListenStream=0.0.0.0:{port}",
         *(f"--setenv={name}={given[name]}" for name in kept),
         str(locations.VENV / "bin" / "magi-agent")],
        check=True, timeout=30,
    )  # fmt: skip
    yield agent, port
    for verb in ("stop", "reset-failed"):
        subprocess.run(
            ["systemctl", "--user", verb, f"{ACTIVATED}.socket", f"{ACTIVATED}.service"],
            check=False, capture_output=True, timeout=60,
        )  # fmt: skip


def over_tcp(host: str, port: int, method: str, path: str) -> Answer:
    """Ask over TCP."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return Answer(response.status, {}, json.loads(response.read()))
    finally:
        connection.close()


def test_sockets_from_systemd_win_and_stay(activated: tuple[ActivatedAgent, int], systemd_user: SystemdUser) -> None:
    agent, port = activated
    inode = agent.handed_over.stat().st_ino

    assert agent.must("GET", "/")["name"] == "magi-agent", "the first request starts the agent and is answered"

    assert agent.ask("POST", "/api/models/rescan").status == 200
    assert over_tcp("127.0.0.1", port, "POST", "/api/models/rescan").status == 200
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                refused = over_tcp(address.address, port, "GET", "/api/models/registry")
                assert (refused.status, refused.body["error"]) == (401, "Unauthorized")
    assert not (agent.folder / "own.sock").exists(), "the settings are not listened on"
    said = f"api.tcp is {agent.settings['MAGI_TCP']}, and systemd has made http://0.0.0.0:{port}: "
    problems = agent.ask("GET", "/health/ready").body["problems"]
    assert any(problem.startswith(said) for problem in problems)
    assert any(problem.startswith("api.socket is ") for problem in problems)
    command = ["journalctl", f"--directory={systemd_user.journal}", "--output=cat", "--no-pager", "--lines=2000"]
    # Other tests' units have their lines there too, and not all of them are UTF-8.
    wait_until(lambda: said.encode() in subprocess.run(command, capture_output=True).stdout, "the journal says so")
    host, _, own = agent.settings["MAGI_TCP"].rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        over_tcp(host, int(own), "GET", "/")

    subprocess.run(["systemctl", "--user", "stop", f"{ACTIVATED}.service"], check=True, timeout=60)

    assert agent.handed_over.stat().st_ino == inode
    wait_until(lambda: agent.must("GET", "/")["name"] == "magi-agent", "the next request starts it again")


class SocketUnits(ActivatedAgent):
    """An agent behind socket units of its own, as a package would bring them; nothing runs until somebody connects."""

    service: str
    sockets: tuple[str, ...]
    entries: dict[str, Path | tuple[str, int]]
    """Where it is to be reached, by what the socket is."""

    def through(self, entry: str, path: str = "/") -> Answer:
        """Ask on one of the sockets, on a connection of its own."""
        address = self.entries[entry]
        if isinstance(address, Path):
            self.handed_over = address
            return self.ask("GET", path)
        return over_tcp(*address, "GET", path)

    def systemctl(self, *words: str, check: bool = True) -> None:
        subprocess.run(["systemctl", "--user", *words], check=check, capture_output=True, timeout=90)


@pytest.fixture
def socket_units(
    systemd_user: SystemdUser, tmp_path: Path, unused_ports: PortRanges, llama_server: Path
) -> Iterator[SocketUnits]:
    """Two unix sockets, one of them named, and two TCP sockets, in three units; all lead to one service."""
    (tmp_path / "models").mkdir()
    agent = SocketUnits(tmp_path, tmp_path / "models", unused_ports(4), llama_server)
    one, other, own = (unused_ports()[0] for _ in range(3))
    agent.service = "api-behind-sockets.service"
    agent.handed_over = tmp_path / "run" / "api.sock"
    agent.entries = {
        "unix": agent.handed_over,
        "unix unnamed": tmp_path / "other.sock",
        "tcp": ("127.0.0.1", one),
        "tcp beside it": ("127.0.0.1", other),
    }
    agent.settings = {"MAGI_TCP": f"127.0.0.1:{own}", "MAGI_SOCKET": str(tmp_path / "own.sock")}
    given = agent.environment()
    kept = [name for name in given if name.startswith(("MAGI_", "XDG_", "DBUS_"))]
    kept += ["MODEL_SCAN_PATH", "REGISTRY_PATH", "PROFILES_PATH", "LLAMA_SERVER_PATH", "ACTIVE_PROFILE", "PATH"]
    variables = "".join(f'Environment="{name}={given[name]}"\n'.replace("%", "%%") for name in kept)
    listen = {
        "api-behind-sockets-api.socket": f"ListenStream={agent.entries['unix']}\nSocketMode=0600\n"
        "FileDescriptorName=api\nRemoveOnStop=yes\n",
        "api-behind-sockets-other.socket": f"ListenStream={agent.entries['unix unnamed']}\n",
        "api-behind-sockets-tcp.socket": f"ListenStream=127.0.0.1:{one}\nListenStream=127.0.0.1:{other}\n",
    }
    agent.sockets = tuple(listen)
    program = locations.VENV / "bin" / "magi-agent"
    units = {name: f"[Socket]\nService={agent.service}\n{lines}" for name, lines in listen.items()}
    units[agent.service] = (
        f"[Unit]\nRequires={' '.join(listen)}\n[Service]\nType=notify\nExecStart={program}\n{variables}"
    )
    folder = systemd_user.runtime / "systemd" / "user"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in units.items():
        (folder / name).write_text(text)
    try:
        agent.systemctl("daemon-reload")
        agent.systemctl("start", *agent.sockets)
        yield agent
    finally:
        agent.systemctl("stop", *agent.sockets, agent.service, check=False)
        agent.systemctl("reset-failed", *units, check=False)
        for name in units:
            (folder / name).unlink()
        agent.systemctl("daemon-reload")


@pytest.mark.parametrize("entry", ["unix", "unix unnamed", "tcp", "tcp beside it"])
def test_a_connection_on_any_of_the_sockets_starts_it_and_all_are_answered(
    socket_units: SocketUnits, entry: str
) -> None:
    assert unit_property(socket_units.service, "ActiveState") == "inactive"

    assert socket_units.through(entry).body["name"] == "magi-agent"

    assert unit_property(socket_units.service, "ActiveState") == "active"
    for each in socket_units.entries:
        assert socket_units.through(each, "/health/live").status == 200
    assert not (socket_units.folder / "own.sock").exists()
    host, _, own = socket_units.settings["MAGI_TCP"].rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        over_tcp(host, int(own), "GET", "/")


def test_the_sockets_stay_as_systemd_made_them(socket_units: SocketUnits) -> None:
    files = [address for address in socket_units.entries.values() if isinstance(address, Path)]
    before = [(file.stat().st_ino, file.stat().st_mode) for file in files]
    for entry in socket_units.entries:
        assert socket_units.through(entry).status == 200
    socket_units.systemctl("stop", socket_units.service)

    assert [(file.stat().st_ino, file.stat().st_mode) for file in files] == before
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


def test_the_queue_of_a_socket_is_as_long_as_its_unit_says(socket_units: SocketUnits) -> None:
    assert socket_units.through("unix").status == 200
    process = int(unit_property(socket_units.service, "MainPID"))
    os.kill(process, signal.SIGSTOP)
    try:
        with contextlib.ExitStack() as callers:
            for _ in range(300):
                caller = callers.enter_context(socket.socket(socket.AF_UNIX))
                caller.setblocking(False)
                caller.connect(str(socket_units.entries["unix"]))  # BlockingIOError where the queue is full
    finally:
        os.kill(process, signal.SIGCONT)


def test_nobody_who_connects_while_it_is_restarted_is_turned_away(socket_units: SocketUnits) -> None:
    assert socket_units.through("unix").status == 200
    enough = threading.Event()
    answered: Counter[str] = Counter()
    failed: list[str] = []

    def ask_again_and_again(entry: str) -> None:
        while not enough.is_set():
            try:
                status = one_request(socket_units.entries[entry])
            except OSError as error:
                status = repr(error)
            if status.startswith("HTTP/1.1 200 "):
                answered[entry] += 1
            else:
                failed.append(f"{entry}: {status}")

    def goes_on(before: Counter[str]) -> bool:
        return bool(failed) or all(answered[entry] > before[entry] + 20 for entry in socket_units.entries)

    callers = [threading.Thread(target=ask_again_and_again, args=(entry,)) for entry in socket_units.entries]
    for caller in callers:
        caller.start()
    try:
        for _ in range(3):
            before = answered.copy()
            pid = unit_property(socket_units.service, "MainPID")
            socket_units.systemctl("restart", socket_units.service)
            assert unit_property(socket_units.service, "MainPID") != pid
            wait_until(partial(goes_on, before), "all are answered by the new one", 60)
    finally:
        enough.set()
        for caller in callers:
            caller.join(90)

    assert failed == []
    assert set(answered) == set(socket_units.entries)


def one_request(address: Path | tuple[str, int]) -> str:
    """The status line of the answer to one request on a connection of its own; empty where it broke off."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(60)
        connection.connect(str(address) if isinstance(address, Path) else address)
        connection.sendall(REQUEST)
        with connection.makefile("rb") as answer:
            return answer.readline().decode()


async def test_who_has_connected_already_may_still_ask_when_it_stops(settings: Settings) -> None:
    assert settings.socket is not None
    listeners = Listeners(application(), settings, {})
    await listeners.start()
    reader, writer = await asyncio.open_unix_connection(str(settings.socket))
    path = settings.socket
    await until(lambda: is_connected(listeners), "the connection is known")

    async def is_closed() -> bool:
        return not path.exists()

    stopping = asyncio.create_task(listeners.stop())
    await until(is_closed, "it stops")
    writer.write(REQUEST)

    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    await stopping
    writer.close()


async def is_connected(listeners: Listeners) -> bool:
    assert listeners._runner is not None
    assert listeners._runner.server is not None
    return bool(listeners._runner.server.connections)


async def test_who_connects_and_never_asks_holds_up_the_stop_for_a_moment_only(settings: Settings) -> None:
    assert settings.socket is not None
    listeners = Listeners(application(), settings, {})
    await listeners.start()
    reader, writer = await asyncio.open_unix_connection(str(settings.socket))
    await until(lambda: is_connected(listeners), "the connection is known")

    async with asyncio.timeout(30):
        await listeners.stop()
        assert await reader.read() == b""
    writer.close()


async def test_a_connection_that_was_accepted_the_moment_it_stops_is_answered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.socket is not None
    listeners = Listeners(application(), settings, {})
    await listeners.start()
    [server] = [server for server in listeners._servers if server.sockets[0].family == socket.AF_UNIX]
    loop: Any = asyncio.get_running_loop()
    remove_reader = loop.remove_reader

    def accept_first(channel: Any) -> bool:
        if channel.fileno() == server.sockets[0].fileno():
            # What asyncio does in the same turn of the loop, when the kernel says that somebody has connected.
            inside: Any = server
            loop._accept_connection(inside._protocol_factory, inside._sockets[0], backlog=1, server=server)
        return bool(remove_reader(channel))

    monkeypatch.setattr(loop, "remove_reader", accept_first)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(30)
        # The loop has no turn from here to there, so nobody has accepted it yet.
        stopping = listeners.stop()
        monkeypatch.setattr("magi_agent.api.listeners.asyncio.to_thread", at_once)
        caller.connect(str(settings.socket))
        caller.sendall(REQUEST)

        await stopping

        with caller.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 200 ")


async def at_once(work: Callable[[], None]) -> None:
    """Run what would run in a thread, without giving the loop a turn."""
    work()
