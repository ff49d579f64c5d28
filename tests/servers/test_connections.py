"""The one place that opens connections to servers: aiohttp's own servers play llama-servers at ports and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from magi_agent.servers import connections as module
from magi_agent.servers import launcher
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import AtPort, AtSocket, Reach

SECONDS = aiohttp.ClientTimeout(total=20)


@dataclass(slots=True)
class Echo:
    """Tells what it was asked, and remembers."""

    asked: list[tuple[str, str, str | None, bytes]] = field(default_factory=list)
    hold: asyncio.Event | None = None
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs, request.headers.get("Authorization"), await request.read()))
        self.was_asked.set()
        if self.hold is not None:
            await self.hold.wait()
        if request.path == "/away":
            raise web.HTTPFound("/elsewhere")
        return web.json_response({"path": request.path})


MakeServer = Callable[[Echo, Path | None], Awaitable[Reach]]


@pytest.fixture
async def serve() -> AsyncIterator[MakeServer]:
    """Serves at a socket, or where there is none, at a port."""
    runners: list[web.AppRunner] = []

    async def make(echo: Echo, socket: Path | None) -> Reach:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", echo.handle)
        runner = web.AppRunner(application)
        runners.append(runner)
        await runner.setup()
        if socket is not None:
            await web.UnixSite(runner, str(socket)).start()
            return AtSocket(socket)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return AtPort("127.0.0.1", runner.addresses[0][1])

    yield make
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def connections() -> AsyncIterator[ServerConnections]:
    connections = ServerConnections()
    yield connections
    await connections.close()


async def ask(connections: ServerConnections, reach: Reach, path: str, *, with_key: bool = True) -> int:
    async with connections.request(reach, "GET", path, timeout=SECONDS, with_key=with_key) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize("at_socket", [True, False])
async def test_a_request_and_its_answer(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path, at_socket: bool
) -> None:
    echo = Echo()
    reach = await serve(echo, tmp_path / "x.sock" if at_socket else None)
    async with connections.request(
        reach, "POST", "/v1/x?y=1", timeout=SECONDS, headers={"Authorization": "mine"}, data=b"body"
    ) as response:
        assert await response.json() == {"path": "/v1/x"}

    assert await ask(connections, reach, "/away") == 302
    assert echo.asked == [("POST", "/v1/x?y=1", "mine", b"body"), ("GET", "/away", None, b"")]


async def test_the_key_goes_along_unless_it_is_not_to(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path
) -> None:
    echo = Echo()
    plain = await serve(echo, None)
    assert isinstance(plain, AtPort)
    key = tmp_path / "key"
    key.write_text("secret\n")
    reach = AtPort(plain.host, plain.port, key)

    await ask(connections, reach, "/", with_key=False)
    await ask(connections, reach, "/")
    key.unlink()
    await ask(connections, reach, "/")  # it is remembered: a file of that name never has another key

    assert [authorization for _, _, authorization, _ in echo.asked] == [None, "Bearer secret", "Bearer secret"]


async def test_a_key_that_cannot_be_read_is_no_question_without_it(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path
) -> None:
    echo = Echo()
    plain = await serve(echo, None)
    assert isinstance(plain, AtPort)

    with pytest.raises(FileNotFoundError):
        await ask(connections, AtPort(plain.host, plain.port, tmp_path / "none"), "/")
    assert echo.asked == []


async def test_sessions_of_servers_that_are_gone_are_closed_and_none_that_is_used(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SOCKETS_KEPT", 2)
    closed: list[str] = []
    close = aiohttp.ClientSession.close

    async def closing(session: aiohttp.ClientSession) -> None:
        assert isinstance(session.connector, aiohttp.UnixConnector)
        closed.append(Path(session.connector.path).name)
        await close(session)

    monkeypatch.setattr(aiohttp.ClientSession, "close", closing)
    busy = Echo(hold=asyncio.Event())
    asking = asyncio.create_task(ask(connections, await serve(busy, tmp_path / "busy.sock"), "/"))
    await busy.was_asked.wait()
    for name in ("a", "b", "c", "a"):
        reach = AtSocket(tmp_path / f"{name}.sock")
        if not reach.path.exists():
            await serve(Echo(), reach.path)
        assert await ask(connections, reach, "/") == 200
    assert closed == ["a.sock", "b.sock", "c.sock"]
    assert busy.hold is not None
    busy.hold.set()
    assert await asking == 200


async def test_it_can_be_used_again_after_it_was_closed(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path
) -> None:
    for reach in (await serve(Echo(), None), await serve(Echo(), tmp_path / "x.sock")):
        assert await ask(connections, reach, "/") == 200
        await connections.close()
        assert await ask(connections, reach, "/") == 200


class Fickle:
    """Answers the first request on each connection. What comes of another is told by ``end``."""

    def __init__(self, end: str) -> None:
        self.end = end
        self.answered = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"body")
        self.answered += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        if self.end != "at once":
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readuntil(b"body")
        if self.end == "reset":
            channel = writer.get_extra_info("socket")
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()


@pytest.mark.parametrize("end", ["at once", "closed", "reset"])
async def test_who_finds_a_kept_connection_closed_is_answered_on_a_new_one(
    connections: ServerConnections, end: str
) -> None:
    fickle = Fickle(end)
    server = await asyncio.start_server(fickle.handle, "127.0.0.1", 0)
    reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        for _ in range(20):
            async with connections.request(
                reach, "POST", "/v1/x", timeout=SECONDS, data=b"body", kept_open=True
            ) as response:
                assert await response.read() == b"{}"
    finally:
        server.close()
        await server.wait_closed()

    assert fickle.answered == 20


async def test_what_a_closed_connection_meets_is_told_where_a_new_one_meets_it_too(
    connections: ServerConnections,
) -> None:
    async def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(end, "127.0.0.1", 0)
    reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
    for raised in (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectorError):
        with pytest.raises(raised):
            async with connections.request(reach, "POST", "/v1/x", timeout=SECONDS, data=b"body", kept_open=True):
                pass
        server.close()
        await server.wait_closed()


async def test_a_server_that_ends_at_once_on_a_kept_connection_was_asked(connections: ServerConnections) -> None:
    asked = 0

    async def answer_and_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readuntil(b"body"):
            asked += 1
            if asked == 2:
                server.close()
                writer.close()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    server = await asyncio.start_server(answer_and_end, "127.0.0.1", 0)
    reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])

    async def ask_on_one() -> bytes:
        async with connections.request(reach, "POST", "/", timeout=SECONDS, data=b"body", kept_open=True) as response:
            return await response.read()

    assert await ask_on_one() == b"{}"
    # It may have been what was asked: to say that nobody took a connection would have others asked the same.
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await ask_on_one()
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask_on_one()
    await server.wait_closed()
    assert asked == 2
    # Or else one that was started anew since might be asked the same.
    assert module._SEEN_CLOSED_SECONDS <= launcher._RETRY_PAUSE


async def test_a_server_that_ends_at_work_on_a_request_is_not_asked_again(
    connections: ServerConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SEEN_CLOSED_SECONDS", 0.2)
    asked = 0

    async def work_and_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"body")
        asked += 1
        await asyncio.sleep(0.3)
        writer.close()

    server = await asyncio.start_server(work_and_end, "127.0.0.1", 0)
    reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            async with connections.request(reach, "POST", "/v1/x", timeout=SECONDS, data=b"body", kept_open=True):
                pass
    finally:
        server.close()
        await server.wait_closed()

    assert asked == 1
