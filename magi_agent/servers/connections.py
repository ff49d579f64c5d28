"""The one place that opens connections to servers, however each of them is reached."""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final

from magi_agent.servers.http_exchange import (
    Exchange,
    ExchangeError,
    NotConnected,
    NothingSaid,
    question,
)
from magi_agent.servers.reach import AtPort, Reach
from magi_agent.servers.server_connection import ServerConnection, connected, connecting
from magi_agent.servers.server_keys import read_key
from magi_agent.servers.silence import SilenceWatch

_KEPT_OPEN_SECONDS: Final = 3.0
"""How long a connection waits for the next request; a server closes it after five."""
_MOST_KEPT: Final = 256
"""Connections that wait, to all servers."""
_KEYS_KEPT: Final = 1024
_SEEN_CLOSED_SECONDS: Final = 1.0
"""In which a kept connection turns out to be closed; later it is the end of a server that was at work.

No longer than systemd waits before it starts a server anew that has ended: who takes a new connection within this time
has not ended.
"""


class ServerConnections:
    """Opens connections to servers. Made without a loop, used within one, closed at its end."""

    def __init__(self) -> None:
        self._kept: dict[Reach, list[tuple[ServerConnection, float]]] = {}
        """Connections that wait for the next request, each with when it has waited long enough; the newest is last."""
        self._count = 0
        self._let_go: set[Reach] = set()
        """Servers that stop: nothing is kept for them before somebody asks anew."""
        self._sweep: asyncio.TimerHandle | None = None
        self._keys: dict[Path, str] = {}
        self._silences = SilenceWatch()

    def close(self) -> None:
        """Cut what waits. What is being answered ends with whoever asked."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self._close_kept(math.inf)

    def waiting(self, reach: Reach) -> int:
        """How many connections to a server wait to be used again."""
        return len(self._kept.get(reach, ()))

    def let_go(self, reach: Reach) -> None:
        """Keep nothing waiting at a server that is to stop, nor after its last answers: it would wait 0.1 s."""
        self._let_go.add(reach)
        for connection, _ in self._kept.pop(reach, ()):
            connection.close()
            self._count -= 1

    async def ask(
        self,
        reach: Reach,
        method: str,
        target: str,
        *,
        silence: float,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        with_key: bool = True,
        kept_open: bool = False,
    ) -> Exchange:
        """Ask a server for ``target``, a path with its query, and give its answer once the head is there.

        ``silence``: seconds for which the server may say nothing. ``with_key`` sends the server's key along, if it
        asks for one: only to be true where it is known who listens. ``kept_open`` has connections used again. Where
        one turns out to be closed, at once, nothing was answered on it, and the server is asked on a new one. Who was
        at work on a request and ended is not asked again: it may be that what was asked is why. So ``NotConnected``
        says that nobody was asked; where nobody takes the new connection, it is told what became of the first.

        Raises ``ExchangeError``, ``TimeoutError``, ``ValueError`` for what cannot be asked, and ``OSError`` where the
        key cannot be read.
        """
        if with_key and isinstance(reach, AtPort) and reach.key_file is not None:
            headers = {**(headers or {}), "Authorization": f"Bearer {await self.key(reach.key_file)}"}
        length = len(body) if body is not None else 0 if method == "POST" else None
        head = question(reach, method, target, headers or {}, length, is_last=not kept_open)
        is_head = method == "HEAD"
        closed: ExchangeError | None = None
        if kept_open and self._let_go:
            self._let_go.discard(reach)
        if kept_open and (kept := self._take(reach)) is not None:
            asked_at = monotonic()
            answer = Exchange(kept, self._silences, silence, partial(self._take_back, reach))
            try:
                await answer.ask(head, body, has_no_body=is_head)
            except (NothingSaid, NotConnected) as error:
                if monotonic() - asked_at > _SEEN_CLOSED_SECONDS:
                    raise
                closed = error
            else:
                return answer
        give_back = partial(self._take_back, reach) if kept_open else None
        try:
            answer = Exchange(await _connected(reach), self._silences, silence, give_back)
            await answer.ask(head, body, has_no_body=is_head)
        except NotConnected:
            if closed is not None:
                raise closed from None
            raise
        return answer

    async def key(self, path: Path) -> str:
        """The key in a server's key file, which no other key ever takes the place of. Raises ``OSError``."""
        if path not in self._keys:
            key = await asyncio.to_thread(read_key, path)
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            self._keys[path] = key
        return self._keys[path]

    def _take(self, reach: Reach) -> ServerConnection | None:
        """A connection that can be used again, as far as can be told: it is still there, and nothing has come on it."""
        waiting = self._kept.get(reach)
        while waiting:
            connection, _ = waiting.pop()
            self._count -= 1
            if connection.is_quiet:
                return connection
            connection.close()
        return None

    def _take_back(self, reach: Reach, connection: ServerConnection | None) -> None:
        """Keep a connection for the next request; where nothing can be asked on it any more, make another for that.

        llama-server ends its connection after each stream. Who asks the next has the connecting behind it then, and a
        thread of the server that waits for it already. It is one such at most, so that it never takes a thread of
        which there were not as many in use a moment ago.
        """
        if connection is not None:
            self._keep(reach, connection)
        elif isinstance(reach, AtPort):
            # Once the end of the answer is written: that goes before.
            asyncio.get_running_loop().call_soon(self._renew, reach)

    def _renew(self, reach: AtPort) -> None:
        if reach not in self._let_go and not self.waiting(reach) and self._count < _MOST_KEPT:
            with contextlib.suppress(OSError):
                connection = connecting(reach)
                connection.watch()
                self._keep(reach, connection)

    def _keep(self, reach: Reach, connection: ServerConnection) -> None:
        if self._count >= _MOST_KEPT or reach in self._let_go:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        self._kept.setdefault(reach, []).append((connection, loop.time() + _KEPT_OPEN_SECONDS))
        self._count += 1
        if self._sweep is None:
            self._sweep = loop.call_later(_KEPT_OPEN_SECONDS, self._sweep_kept)

    def _sweep_kept(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        self._close_kept(loop.time())
        if self._kept:
            self._sweep = loop.call_later(_KEPT_OPEN_SECONDS / 2, self._sweep_kept)

    def _close_kept(self, now: float) -> None:
        """Close those that have waited long enough by then."""
        for reach, waiting in tuple(self._kept.items()):
            for connection, until in waiting:
                if until <= now:
                    connection.close()
            waiting[:] = [(connection, until) for connection, until in waiting if until > now]
            if not waiting:
                del self._kept[reach]
        self._count = sum(map(len, self._kept.values()))


async def _connected(reach: Reach) -> ServerConnection:
    try:
        return await connected(reach)
    except OSError as error:
        raise NotConnected(error) from None
