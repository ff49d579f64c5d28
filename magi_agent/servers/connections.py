"""The one place that opens connections to servers, however each of them is reached."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp.payload import Payload

from magi_agent.servers.reach import AtPort, AtSocket, Reach
from magi_agent.servers.server_keys import read_key

_AT_ONCE: Final = 64
"""Connections to all servers at ports, and to each server at a socket."""
_SOCKETS_KEPT: Final = 128
_KEPT_OPEN_SECONDS: Final = 3.0
"""How long a connection waits for the next request; a server closes it after five."""
_KEYS_KEPT: Final = 1024
_CLOSED: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError)
"""What comes of a connection that the other end has closed, by how far a request got on it."""
_SEEN_CLOSED_SECONDS: Final = 1.0
"""In which it comes; later it is the end of a server that was at work on the request.

No longer than systemd waits before it starts a server anew that has ended: who takes a new connection within this time
has not ended.
"""
_ANY_HOST: Final = "http://localhost"
"""Before a path in a request over a unix socket; nobody looks it up."""


@dataclass(slots=True)
class _Channel:
    """A session for the server at one socket."""

    session: aiohttp.ClientSession
    users: int = 0


class ServerConnections:
    """Opens connections to servers. Made without a loop, used within one, closed at its end."""

    def __init__(self) -> None:
        self._ports: dict[bool, aiohttp.ClientSession] = {}
        self._sockets: OrderedDict[tuple[Path, bool], _Channel] = OrderedDict()
        self._keys: dict[Path, str] = {}

    async def close(self) -> None:
        """Cut what is open."""
        channels = [channel.session for channel in self._sockets.values()]
        self._sockets.clear()
        ports = list(self._ports.values())
        self._ports.clear()
        for session in (*channels, *ports):
            await session.close()

    @contextlib.asynccontextmanager
    async def request(
        self,
        reach: Reach,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  # aiohttp's own kind
        headers: Mapping[str, str] | None = None,
        data: bytes | Payload | None = None,
        with_key: bool = True,
        kept_open: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask a server, and give the answer as it arrives; a redirect is not followed.

        ``with_key`` sends the server's key along, if it asks for one: only to be true where it is known who listens.
        ``kept_open`` has the connection used again, and as many of them as there are requests. Where one turns out to
        be closed, at once, nothing was answered on it, and the server is asked on a new one. Who was at work on a
        request and ended is not asked again: it may be that what was asked is why. So ``aiohttp.ClientConnectorError``
        says that nobody was asked; where nobody takes the new connection either, the error is what became of the first.

        Raises ``aiohttp.ClientError``, ``TimeoutError``, and ``OSError`` where the key cannot be read.
        """
        sent = dict(headers or {})
        if with_key and isinstance(reach, AtPort) and reach.key_file is not None:
            sent["Authorization"] = f"Bearer {await self.key(reach.key_file)}"
        url = f"{reach.url if isinstance(reach, AtPort) else _ANY_HOST}{path}"
        async with contextlib.AsyncExitStack() as held:

            async def asked(kept_open: bool) -> aiohttp.ClientResponse:
                session = await held.enter_async_context(self._session(reach, kept_open))
                return await held.enter_async_context(
                    session.request(method, url, headers=sent, data=data, timeout=timeout, allow_redirects=False)
                )

            loop = asyncio.get_running_loop()
            asked_at = loop.time()
            try:
                response = await asked(kept_open)
            except _CLOSED as error:
                was_at_work = loop.time() - asked_at > _SEEN_CLOSED_SECONDS
                if not kept_open or was_at_work or isinstance(error, aiohttp.ClientConnectorError):
                    raise
                # A connection that the server was about to close; or it has ended, and it may be that this is why.
                try:
                    response = await asked(kept_open=False)
                except aiohttp.ClientConnectorError:
                    raise error from None
            yield response

    async def key(self, path: Path) -> str:
        """The key in a server's key file, which no other key ever takes the place of. Raises ``OSError``."""
        if path not in self._keys:
            key = await asyncio.to_thread(read_key, path)
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            self._keys[path] = key
        return self._keys[path]

    @contextlib.asynccontextmanager
    async def _session(self, reach: Reach, kept_open: bool) -> AsyncIterator[aiohttp.ClientSession]:
        match reach:
            case AtPort():
                if kept_open not in self._ports:
                    self._ports[kept_open] = _session_over(aiohttp.TCPConnector(**_habits(kept_open)))
                yield self._ports[kept_open]
            case AtSocket(path=path):
                channel = self._sockets.get((path, kept_open))
                if channel is None:
                    connector = aiohttp.UnixConnector(path=str(path), **_habits(kept_open))
                    channel = self._sockets[path, kept_open] = _Channel(_session_over(connector))
                self._sockets.move_to_end((path, kept_open))
                channel.users += 1
                try:
                    yield channel.session
                finally:
                    channel.users -= 1
                    await self._close_unused()

    async def _close_unused(self) -> None:
        """Keep no more sessions than so many: those of servers that are gone were used longest ago."""
        beyond = len(self._sockets) - _SOCKETS_KEPT
        unused = [key for key, channel in self._sockets.items() if not channel.users][: max(0, beyond)]
        for channel in [self._sockets.pop(key) for key in unused]:
            await channel.session.close()


def _habits(kept_open: bool) -> dict[str, Any]:
    if kept_open:
        return {"limit": 0, "keepalive_timeout": _KEPT_OPEN_SECONDS}
    return {"limit": _AT_ONCE, "force_close": True}


def _session_over(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
