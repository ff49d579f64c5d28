"""The one place that opens connections to servers: aiohttp's own servers play llama-servers at ports and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from magi_agent.servers import connections as module
from magi_agent.servers import launcher
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.http_exchange import NotConnected, NothingSaid
from magi_agent.servers.reach import AtPort, AtSocket, Reach

SECONDS = 20.0


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
    connections.close()


async def ask(connections: ServerConnections, reach: Reach, path: str, *, with_key: bool = True) -> int:
    with await connections.ask(reach, "GET", path, silence=SECONDS, with_key=with_key) as answer:
        assert await answer.read(1000) is not None
        return answer.status


@pytest.mark.parametrize("at_socket", [True, False])
async def test_a_request_and_its_answer(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path, at_socket: bool
) -> None:
    echo = Echo()
    reach = await serve(echo, tmp_path / "x.sock" if at_socket else None)
    with await connections.ask(
        reach, "POST", "/v1/x?y=1", silence=SECONDS, headers={"Authorization": "mine"}, body=b"body"
    ) as answer:
        assert await answer.read(1000) == b'{"path": "/v1/x"}'

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


async def test_what_is_kept_open_is_used_again_and_closed_in_time(
    connections: ServerConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_OPEN_SECONDS", 0.2)
    monkeypatch.setattr(module, "_MOST_KEPT", 3)
    opened = ended = 0
    two_ended, all_ended = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened, ended
        opened += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"body"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        ended += 1
        if ended == 2:
            two_ended.set()
        if ended == opened:
            all_ended.set()

    async def once() -> None:
        with await connections.ask(reach, "POST", "/", silence=SECONDS, body=b"body", kept_open=True) as said:
            assert await said.read(10) == b"{}"
            # Until all have one of their own.
            await asyncio.sleep(0.02)

    async with speaking(answer) as (reach, _):
        for _ in range(3):
            await once()
        assert opened == 1
        await asyncio.gather(*(once() for _ in range(5)))
        assert opened == 5
        # There is room for three.
        await asyncio.wait_for(two_ended.wait(), 2)
        await asyncio.gather(*(once() for _ in range(3)))
        assert opened == 5
        await asyncio.wait_for(all_ended.wait(), 2)


async def test_it_can_be_used_again_after_it_was_closed(
    connections: ServerConnections, serve: MakeServer, tmp_path: Path
) -> None:
    for reach in (await serve(Echo(), None), await serve(Echo(), tmp_path / "x.sock")):
        assert await ask(connections, reach, "/") == 200
        connections.close()
        assert await ask(connections, reach, "/") == 200


Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def speaking(handle: Handle) -> AsyncIterator[tuple[AtPort, asyncio.Server]]:
    """A server that does what ``handle`` does with each connection, and then ends it."""
    at_work: set[asyncio.Task[None]] = set()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        at_work.add(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            await handle(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    try:
        yield AtPort("127.0.0.1", server.sockets[0].getsockname()[1]), server
    finally:
        server.close()
        await server.wait_closed()
        for task in at_work:
            task.cancel()
        await asyncio.gather(*at_work, return_exceptions=True)


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
            await reader.readuntil(b"body")
        if self.end == "reset":
            channel = writer.get_extra_info("socket")
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("end", ["at once", "closed", "reset"])
async def test_who_finds_a_kept_connection_closed_is_answered_on_a_new_one(
    connections: ServerConnections, end: str
) -> None:
    fickle = Fickle(end)
    async with speaking(fickle.handle) as (reach, _):
        for _ in range(20):
            with await connections.ask(reach, "POST", "/v1/x", silence=SECONDS, body=b"body", kept_open=True) as answer:
                assert await answer.read(10) == b"{}"

    assert fickle.answered == 20


async def test_who_hears_nothing_on_a_new_connection_is_told_so(connections: ServerConnections) -> None:
    asked = 0

    async def end(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"body")
        asked += 1

    async with speaking(end) as (reach, server):
        with pytest.raises(NothingSaid):
            await connections.ask(reach, "POST", "/v1/x", silence=SECONDS, body=b"body", kept_open=True)
        server.close()
        with pytest.raises(NotConnected):
            await connections.ask(reach, "POST", "/v1/x", silence=SECONDS, body=b"body", kept_open=True)

    assert asked == 1


async def test_a_server_that_ends_at_once_on_a_kept_connection_was_asked(connections: ServerConnections) -> None:
    asked = 0

    async def answer_and_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readuntil(b"body"):
            asked += 1
            if asked == 2:
                server.close()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async def ask_on_one() -> bytes | None:
        with await connections.ask(reach, "POST", "/", silence=SECONDS, body=b"body", kept_open=True) as answer:
            return await answer.read(10)

    async with speaking(answer_and_end) as (reach, server):
        assert await ask_on_one() == b"{}"
        # It may have been what was asked: to say that nobody took a connection would have others asked the same.
        with pytest.raises(NothingSaid):
            await ask_on_one()
        with pytest.raises(NotConnected):
            await ask_on_one()
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
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"body")
        asked += 1
        await asyncio.sleep(0.3)

    async with speaking(work_and_end) as (reach, _):
        with await connections.ask(reach, "POST", "/v1/x", silence=SECONDS, body=b"body", kept_open=True) as answer:
            assert await answer.read(10) == b"{}"
        with pytest.raises(NothingSaid):
            await connections.ask(reach, "POST", "/v1/x", silence=SECONDS, body=b"body", kept_open=True)

    assert asked == 1


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


async def test_where_a_server_ends_its_connection_after_an_answer_the_next_one_is_there_already(
    connections: ServerConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama-server does after each stream."""
    monkeypatch.setattr(module, "_KEPT_OPEN_SECONDS", 0.3)
    opened = asked = ended = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened, asked, ended
        opened += 1
        try:
            target = await reader.readuntil(b"\r\n\r\n")
            asked += 1
            writer.write(STREAM if b"/whole" in target else STREAM[:-5])
            await writer.drain()
            await asyncio.sleep(0.05)
        finally:
            ended += 1

    async def once(target: str = "/whole", *, kept_open: bool = True) -> None:
        with await connections.ask(reach, "GET", target, silence=SECONDS, kept_open=kept_open) as said:
            assert await said.next_piece() == b"{}"
            if target == "/whole":
                assert await said.next_piece() == b""
        await asyncio.sleep(0.02)

    async with speaking(answer) as (reach, server):
        for number in range(1, 4):
            await once()
            assert (opened, asked) == (number + 1, number)
        # It is one, however many end.
        await asyncio.gather(*(once() for _ in range(5)))
        assert (opened, asked) == (9, 8)
        # Who left early, or wants none kept, is no sign that somebody comes.
        await once("/part")
        await once(kept_open=False)
        assert (opened, asked) == (10, 10)
        await once()
        assert (opened, asked) == (12, 11)
        # It waits for as long as any other.
        await asyncio.sleep(0.6)
        assert ended == opened == 12
        await once()
        server.close()
        await asyncio.sleep(0.2)
        # Whatever became of the one that was made ahead, nobody takes another.
        with contextlib.suppress(NothingSaid, NotConnected):
            await once()
        with pytest.raises(NotConnected):
            await once()


@pytest.mark.parametrize("said", [STREAM, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"], ids=["stream", "whole"])
async def test_an_answer_that_ends_while_its_server_stops_leaves_no_connection(
    connections: ServerConnections, said: bytes
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(said)

    async with speaking(answer) as (reach, _):
        for is_stopping in (True, False):
            with await connections.ask(reach, "GET", "/", silence=SECONDS, kept_open=True) as answered:
                if is_stopping:
                    connections.let_go(reach)
                assert await answered.read(10) == b"{}"
            await asyncio.sleep(0.02)
            # One that is asked again is there again.
            assert connections.waiting(reach) == (0 if is_stopping else 1)
        connections.let_go(reach)


async def test_a_connection_that_was_made_ahead_to_a_server_that_is_gone_is_none(
    connections: ServerConnections,
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM)

    async with speaking(answer) as (reach, server):
        with await connections.ask(reach, "GET", "/", silence=SECONDS, kept_open=True) as said:
            server.close()
            assert await said.read(10) == b"{}"
        await asyncio.sleep(0.02)
        # That it is refused is seen by who would use it.
        assert connections.waiting(reach) == 1
        with pytest.raises(NotConnected):
            await connections.ask(reach, "GET", "/", silence=SECONDS, kept_open=True)
        assert connections.waiting(reach) == 0
