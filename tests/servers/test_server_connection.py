"""Connections to servers, and what the event loop tells of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from magi_agent.servers import server_connection as module
from magi_agent.servers.reach import AtPort, AtSocket
from magi_agent.servers.server_connection import ServerConnection, connected


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


async def connection_to(listener: socket.socket) -> tuple[ServerConnection, socket.socket]:
    connection = await connected(AtPort(*listener.getsockname()))
    return connection, listener.accept()[0]


def is_watched(descriptor: int) -> bool:
    """Whether the loop has it watched. It is not watched any more after this."""
    return asyncio.get_running_loop().remove_reader(descriptor)


async def test_what_comes_is_told_to_who_listens_now(listener: socket.socket) -> None:
    connection, server = await connection_to(listener)
    told: list[str] = []
    with connection, server:
        connection.listen(lambda: told.append(f"first: {connection.recv(9)!r}"))
        server.send(b"a")
        await asyncio.sleep(0.02)
        connection.listen_no_more()
        connection.listen(lambda: told.append(f"second: {connection.recv(9)!r}"))
        server.send(b"b")
        await asyncio.sleep(0.02)

    assert told == ["first: b'a'", "second: b'b'"]


@pytest.mark.parametrize("ends", [True, False])
async def test_what_nobody_listens_for_stays_where_it_is(listener: socket.socket, ends: bool) -> None:
    """Else the loop would be told of it without a pause, for as long as it is kept."""
    connection, server = await connection_to(listener)
    descriptor = connection._socket.fileno()
    with connection, server:
        connection.watch()
        assert connection.is_quiet
        if ends:
            server.close()
        else:
            server.send(b"late")
        await asyncio.sleep(0.02)
        assert not is_watched(descriptor)
        assert not connection.is_quiet

        came = asyncio.Event()
        connection.listen(came.set)
        await asyncio.wait_for(came.wait(), 1)
        assert connection.recv(9) == (b"" if ends else b"late")


async def test_nothing_is_left_of_one_that_is_closed(listener: socket.socket) -> None:
    connection, server = await connection_to(listener)
    descriptor = connection._socket.fileno()
    connection.listen(lambda: pytest.fail("nothing came"))
    connection.close()
    connection.close()

    assert not is_watched(descriptor)
    with server:
        assert server.recv(1) == b""


async def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await connected(AtSocket(tmp_path / "none.sock"))


async def test_a_unix_socket_whose_queue_is_full_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(await connected(AtSocket(path)))
        waiting = asyncio.create_task(connected(AtSocket(path)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        listener.accept()[0].close()
        stack.enter_context(await waiting)
        monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.05)
        with pytest.raises(TimeoutError):
            await connected(AtSocket(path))
