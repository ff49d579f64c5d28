"""A connection to a server, of which the event loop tells what comes.

It is watched from the first time that somebody listens, and goes on being so while it waits for the next request: to
begin and to end with each would be two calls of the kernel that its first byte waits for. Where something comes that
nobody listens for, be it the server's end, it is watched no more: it stays where it is, for whoever listens next.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final, Self

from magi_agent.servers.reach import AtPort, Reach

_CONNECT_SECONDS: Final = 5.0
_QUEUE_FULL_PAUSE: Final = 0.01
"""Seconds before a unix socket is tried again at which as many connections wait as may."""


class ServerConnection:
    """A socket that is connected, or is about to be. It is to be closed, within the loop that it is used in."""

    __slots__ = ("_is_watched", "_listener", "_loop", "_socket", "recv", "send")

    def __init__(self, connected_socket: socket.socket) -> None:
        self._socket = connected_socket
        self._loop = asyncio.get_running_loop()
        self._listener: Callable[[], None] | None = None
        self._is_watched = False
        self.send = connected_socket.send
        """As a socket's: raises ``BlockingIOError``, ``OSError``."""
        self.recv = connected_socket.recv
        """As a socket's: raises ``BlockingIOError``, ``OSError``."""

    async def send_all(self, data: memoryview) -> None:
        """Send all of it, as the server takes it. Raises ``OSError``."""
        await self._loop.sock_sendall(self._socket, data)

    def listen(self, called: Callable[[], None]) -> None:
        """Have ``called`` whenever something is there to be received."""
        self._listener = called
        self.watch()

    def watch(self) -> None:
        """Begin to watch it, where somebody is to listen soon."""
        if not self._is_watched:
            self._is_watched = True
            self._loop.add_reader(self._socket, self._tell)

    def listen_no_more(self) -> None:
        """Call nobody any more."""
        self._listener = None

    def look_away(self) -> None:
        """Leave what comes where it is, by which the server notices, until somebody listens again."""
        if self._is_watched:
            self._is_watched = False
            self._loop.remove_reader(self._socket)

    @property
    def is_quiet(self) -> bool:
        """Whether it is still there, as far as can be told, and nothing has come that was not received."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """End it."""
        self._listener = None
        self.look_away()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self) -> None:
        if self._listener is None:
            self.look_away()
        else:
            self._listener()


async def connected(reach: Reach) -> ServerConnection:
    """A new connection. At a port, it may still be on its way, and that it was refused be told to who sends.

    Raises ``OSError``, ``TimeoutError``.
    """
    if isinstance(reach, AtPort):
        return connecting(reach)
    connection = _socket(socket.AF_UNIX)
    address = str(reach.path)
    try:
        code = connection.connect_ex(address)
        if code == errno.EAGAIN:
            async with asyncio.timeout(_CONNECT_SECONDS):
                while (code := connection.connect_ex(address)) == errno.EAGAIN:  # noqa: ASYNC110  # nothing tells
                    await asyncio.sleep(_QUEUE_FULL_PAUSE)
        _check_connects(code)
    except BaseException:  # who asked may have left meanwhile, too; it goes on its way
        connection.close()
        raise
    return ServerConnection(connection)


def connecting(reach: AtPort) -> ServerConnection:
    """A new connection to a port, which may still be on its way. Raises ``OSError``."""
    connection = _socket(socket.AF_INET6 if ":" in reach.host else socket.AF_INET)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _check_connects(connection.connect_ex((reach.host, reach.port)))
    except OSError:
        connection.close()
        raise
    return ServerConnection(connection)


def _socket(family: socket.AddressFamily) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _check_connects(code: int) -> None:
    if code not in {0, errno.EINPROGRESS}:
        raise OSError(code, os.strerror(code))
