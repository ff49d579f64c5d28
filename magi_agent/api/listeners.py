"""Where the API listens: a unix socket and a TCP port of its own, or the sockets that systemd hands over.

Sockets from systemd win over both settings, whatever they are called and however many there are. They are systemd's:
their files, their modes and their queues are left alone, and who connects while no agent runs waits for the next one.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from magi_agent.api.access import group_id
from magi_agent.api.connection import Connection
from magi_agent.configuration import needs_token
from magi_agent.errors import ConfigurationError
from magi_agent.settings.settings import Settings, TcpAddress
from magi_agent.systemd.socket_activation import InheritedSocket, inherited_sockets

_LOG: Final = logging.getLogger(__name__)
_BACKLOG: Final = 128
_MODE: Final = 0o660
_PROBE_SECONDS: Final = 1.0
_MOST_CONNECTIONS: Final = 512
"""Half of the files that systemd lets a service have open by default."""
_KEEP_ALIVE: Final = 75.0
_LINGER: Final = 2.0
_END_OF_REQUESTS: Final = 5.0
"""Seconds that requests under way have to end when the API stops."""
_TURNS_TO_BE_KNOWN: Final = 3
"""Turns of the loop that asyncio takes to make a connection of what it accepted; the server must not close before."""
_FIRST_REQUEST: Final = 1.0
"""Seconds that a connection has for its first request when the API stops."""
_FIRST_REQUEST_PAUSE: Final = 0.01


@dataclass(frozen=True, slots=True)
class _SocketFile:
    """A unix socket's file that is ours to remove, as long as it is the one we made."""

    path: Path
    device: int
    inode: int

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = self.path.lstat()
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                self.path.unlink()


class Listeners:
    """The API's sockets, from the first request to the last."""

    def __init__(
        self,
        application: web.Application,
        settings: Settings,
        environment: MutableMapping[str, str],
        has_tokens: Callable[[], bool] = lambda: False,
    ) -> None:
        """``environment`` holds what systemd hands over; its variables are taken out once they are used.

        Where ``has_tokens`` says that there are none, no address is listened on that other hosts reach.
        """
        self._application = application
        self._settings = settings
        self._environment = environment
        self._has_tokens = has_tokens
        self._runner: web.AppRunner | None = None
        self._servers: list[asyncio.Server] = []
        self._file: _SocketFile | None = None
        self.addresses: tuple[str, ...] = ()
        """Where the API answers, for the log."""
        self.reached_from_elsewhere: tuple[str, ...] = ()
        """Those of them that other hosts reach."""
        self.are_systemds = False
        """Whether systemd made them, and so none of the settings."""

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        server = self._runner.server if self._runner is not None else None
        return len(server.connections) if server is not None else 0

    async def start(self) -> None:
        """Listen and answer. Raises ``ConfigurationError``; nothing is left open then."""
        sockets = await asyncio.to_thread(self._open)
        with ExitStack() as unused:
            for channel in sockets:
                unused.enter_context(channel)
            unused.callback(self._remove_file)
            elsewhere = [channel for channel in sockets if not _stays_here(channel)]
            if elsewhere and not self._has_tokens():
                raise ConfigurationError(needs_token(_source(elsewhere[0]), self._settings.tokens_path))
            runner = web.AppRunner(self._application, access_log=None, shutdown_timeout=_END_OF_REQUESTS)
            await runner.setup()
            self._runner = runner
            loop = asyncio.get_running_loop()
            self._servers = [
                await loop.create_server(lambda: _connection(runner), sock=channel, backlog=_BACKLOG)
                for channel in sockets
            ]
            unused.pop_all()
        self.addresses = tuple(_name(channel) for channel in sockets)
        self.reached_from_elsewhere = tuple(_name(channel) for channel in elsewhere)
        self.are_systemds = all(isinstance(channel, InheritedSocket) for channel in sockets) and bool(sockets)

    async def stop(self, finished: Callable[[], Awaitable[None]] | None = None) -> None:
        """Take no new requests, let those under way end for a bounded time, and close.

        ``finished`` waits, for a bounded time, for those that may take longer than others.
        """
        # The file first: as long as its socket is open, no other file can have its inode number.
        await asyncio.to_thread(self._remove_file)
        servers, self._servers = self._servers, []
        loop = asyncio.get_running_loop()
        for channel in (channel for server in servers for channel in server.sockets):
            loop.remove_reader(channel)
        for _ in range(_TURNS_TO_BE_KNOWN):
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        runner, self._runner = self._runner, None
        if runner is not None:
            await _first_requests(runner)
            assert runner.server is not None  # noqa: S101  # it was set up before anybody listened
            # Each connection ends with the request that is under way on it; one without any, now.
            runner.server.pre_shutdown()
            # What never ends by itself does not keep others waiting.
            await runner.shutdown()
            if finished is not None:
                await finished()
            await runner.cleanup()

    def _open(self) -> list[socket.socket]:
        handed_over = inherited_sockets(self._environment)
        if handed_over:
            with ExitStack() as opened:
                sockets = [_checked(name, opened.enter_context(channel)) for name, channel in handed_over]
                opened.pop_all()
            return sockets
        with ExitStack() as opened:
            sockets = []
            if self._settings.socket is not None:
                channel = opened.enter_context(self._open_unix(self._settings.socket))
                opened.callback(self._remove_file)
                sockets.append(channel)
            if self._settings.tcp is not None:
                sockets.append(opened.enter_context(_open_tcp(self._settings.tcp)))
            opened.pop_all()
        return sockets

    def _open_unix(self, path: Path) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_the_way(path)
            # The file takes its mode from the socket, so at no moment may more people connect than at the end.
            os.fchmod(channel.fileno(), _MODE)
            channel.bind(str(path))
            made = path.lstat()
            self._file = _SocketFile(path, made.st_dev, made.st_ino)
            _give_to_group(path)
            path.chmod(_MODE)
            # From here on, another agent that looks sees that somebody lives here.
            channel.listen(_BACKLOG)
        except ConfigurationError:
            channel.close()
            raise
        except OSError as error:
            channel.close()
            self._remove_file()
            raise ConfigurationError(
                f"api.socket (MAGI_SOCKET): cannot listen on {path}: {error.strerror}; name another path, or 'off'"
            ) from None
        return channel

    def _remove_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.remove()


class _Refusal(asyncio.Protocol):
    """A connection that is one too many: it is closed at once, so that the agent keeps files to work with."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _connection(runner: web.AppRunner) -> asyncio.Protocol:
    assert runner.server is not None  # noqa: S101  # it was set up before anybody listened
    if len(runner.server.connections) >= _MOST_CONNECTIONS:
        _LOG.warning("%d connections are open, which is the most: another one was refused", _MOST_CONNECTIONS)
        return _Refusal()
    return Connection(
        runner.server,
        loop=asyncio.get_running_loop(),
        access_log=None,
        keepalive_timeout=_KEEP_ALIVE,
        lingering_time=_LINGER,
        auto_decompress=False,
    )


async def _first_requests(runner: web.AppRunner) -> None:
    """Wait, for a bounded time, until something was asked on each connection: nobody else would answer it."""
    assert runner.server is not None  # noqa: S101  # it was set up before anybody listened
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _FIRST_REQUEST
    while loop.time() < deadline and any(  # noqa: ASYNC110  # aiohttp tells nobody of a connection's first request
        isinstance(connection, Connection) and connection.is_new for connection in runner.server.connections
    ):
        await asyncio.sleep(_FIRST_REQUEST_PAUSE)


def _clear_the_way(path: Path) -> None:
    """Remove the socket file that an agent which died left behind. Raises ``ConfigurationError`` for anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigurationError(
                f"api.socket (MAGI_SOCKET): {path} is there and is no socket; remove it, or name another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except (BlockingIOError, TimeoutError):
            # Somebody listens and is too busy to answer.
            pass
    raise ConfigurationError(
        f"api.socket (MAGI_SOCKET): another program answers on {path}; stop it, or name another path"
    )


def _give_to_group(path: Path) -> None:
    group = group_id()
    if group is None:
        return
    try:
        os.chown(path, -1, group)
    except PermissionError:
        _LOG.warning("%s cannot be given to the group magi: this user is not a member of it", path)


def _open_tcp(address: TcpAddress) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = "another program listens there" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        raise ConfigurationError(
            f"api.tcp (MAGI_TCP): cannot listen on {address}: {reason}; name another address, or 'off'"
        ) from None


def _checked(name: str, channel: socket.socket) -> socket.socket:
    """A socket from systemd, if it is one to take connections from."""
    is_stream = channel.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) and (
        channel.type == socket.SOCK_STREAM and channel.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )
    if not is_stream:
        raise ConfigurationError(
            f"systemd handed over {name!r}, which is no socket that takes connections: "
            "the socket unit wants ListenStream= and Accept=no"
        )
    return channel


def _stays_here(channel: socket.socket) -> bool:
    """Whether only this host reaches a socket."""
    if channel.family == socket.AF_UNIX:
        return True
    address = ipaddress.ip_address(channel.getsockname()[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def _source(channel: socket.socket) -> str:
    """Whose word it was to listen on an address."""
    if isinstance(channel, InheritedSocket):
        return f"{_name(channel)}, which systemd handed over,"
    return f"api.tcp (MAGI_TCP): {_name(channel)}"


def _name(channel: socket.socket) -> str:
    if channel.family == socket.AF_UNIX:
        path = channel.getsockname()
        return f"unix:{os.fsdecode(path)}"
    return f"http://{TcpAddress(*channel.getsockname()[:2])}"
