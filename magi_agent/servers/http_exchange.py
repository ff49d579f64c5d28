"""One question to a server over HTTP/1.1, and its answer as it comes.

Every request of the gateway goes through this, so it is no more than it has to be: a socket, and httptools for what
the server says. llama-server ends its connection after each stream, so most requests need a new one, and on one host
that one is there at once; aiohttp's client connects, sends and waits in turns of the event loop of their own, and
takes twice the time before an answer's first byte.

Nothing is read before somebody wants it: where a client reads slowly, the server writes slowly. Who waits is woken with
what has come, or is not even woken for that: what is poured is given on by the event loop itself (``pour``).
"""

import asyncio
import contextlib
import math
import re
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final, Self

import httptools
from multidict import CIMultiDict

from magi_agent.servers.reach import AtPort, Reach
from magi_agent.servers.server_connection import ServerConnection
from magi_agent.servers.silence import SilenceWatch

_PIECE: Final = 60 * 1024
"""Bytes that are read at once, at most: a buffer that is taken from what the process has, not mapped each time."""
_MOST_AT_ONCE: Final = 8
"""Pieces that are read without a pause; whoever else has something to do has a turn then."""
_LONGEST_HEAD: Final = 64 * 1024
_ONE_WRITE: Final = 64 * 1024
"""A body of up to so many bytes is sent together with the head."""
_CONNECT_SECONDS: Final = 5.0
_FINAL: Final = 200
"""Statuses below this one are said ahead of the answer."""
_TARGET: Final = re.compile(r"/[^\x00-\x20\x7f]*")
_CODING: Final = "utf-8", "surrogateescape"
"""Of heads: whatever is none comes out as it went in."""
_ANY_HOST: Final = "localhost"
"""Named to a server at a unix socket; nobody looks it up."""


class ExchangeError(Exception):
    """No answer came, or not all of it; in words."""


class NotConnected(ExchangeError):
    """Nobody takes connections; nothing was asked."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error) or "it takes no connection")
        self.is_forbidden = isinstance(error, PermissionError)


class NothingSaid(ExchangeError):
    """The server ended the connection before it said anything."""


class BrokenOff(ExchangeError):
    """The server ended the connection too early, or what it says is no HTTP."""


def question(
    reach: Reach, method: str, target: str, headers: Mapping[str, str], length: int | None, *, is_last: bool
) -> bytes:
    """The head of a request for ``target``, a path with its query.

    ``length`` is its body's, in bytes, where it has one; ``is_last`` says that the connection ends with the answer.
    Raises ``ValueError`` where something of it would be taken for the end of a line.
    """
    if not _TARGET.fullmatch(target):
        raise ValueError(f"{target!r} is no path")
    host = reach.authority if isinstance(reach, AtPort) else _ANY_HOST
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    if is_last:
        lines.append("Connection: close")
    head = "\r\n".join(lines)
    if head.count("\r") != len(lines) - 1 or head.count("\n") != len(lines) - 1 or "\0" in head:
        raise ValueError("a header has more than one line")
    return f"{head}\r\n\r\n".encode(*_CODING)


class _Heard:
    """What httptools has made of what the server said, up to now."""

    def __init__(self, *, has_no_body: bool) -> None:
        self._has_no_body = has_no_body
        self.parser = httptools.HttpResponseParser(self)
        self.length = 0
        self.reason = ""
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.body: list[bytes] = []
        """What was not taken yet."""
        self.has_head = False
        self.is_whole = False
        self.can_go_on = False
        """Whether something else can be asked on the connection."""

    @property
    def is_framed(self) -> bool:
        """Whether the answer says where it ends; else it is the connection's end."""
        return "Content-Length" in self.headers or "Transfer-Encoding" in self.headers

    def on_message_begin(self) -> None:
        if self.is_whole:
            self.can_go_on = False
        else:
            # What was said ahead of it is nobody's business.
            self.reason = ""
            self.headers = CIMultiDict()

    def on_status(self, reason: bytes) -> None:
        if not self.is_whole:
            self.reason += reason.decode(*_CODING)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:
            self.headers.add(name.decode(*_CODING), value.decode(*_CODING))

    def on_headers_complete(self) -> None:
        if self.parser.get_status_code() >= _FINAL:
            self.has_head = True
            self.is_whole = self.is_whole or self._has_no_body

    def on_body(self, piece: bytes) -> None:
        if not self.is_whole:
            self.body.append(piece)

    def on_message_complete(self) -> None:
        # Only within this call does the parser know.
        self.can_go_on = self.has_head and not self.is_whole and self.parser.should_keep_alive()
        self.is_whole = self.has_head

    def take(self) -> bytes:
        """The body's next piece."""
        body = self.body
        if len(body) == 1:
            return body.pop()
        piece = b"".join(body)
        body.clear()
        return piece


class Exchange:
    """A question that is asked on a connection, and its answer. It is to be closed, whatever comes of it."""

    __slots__ = (
        "_at_once",
        "_connection",
        "_failure",
        "_give_back",
        "_heard",
        "_is_more",
        "_is_over",
        "_silences",
        "_take",
        "_waiter",
        "headers",
        "reason",
        "silence",
        "status",
        "waits_since",
    )

    def __init__(
        self,
        connection: ServerConnection,
        silences: SilenceWatch,
        silence: float,
        give_back: Callable[[ServerConnection | None], None] | None = None,
    ) -> None:
        """``silence``: seconds for which the server may say nothing, which ``silences`` looks after.

        ``give_back`` is called at the end of a whole answer, with the connection where that can be used again.
        """
        self._connection = connection
        self._silences = silences
        self.silence = silence
        self.waits_since = math.inf
        self._give_back = give_back
        self._heard: _Heard | None = None
        self._failure: ExchangeError | None = None
        self._at_once = 0
        self._is_more = False
        """Whether as much came at last as is read at once, so that there may be more."""
        self._is_over = False
        self._take: Callable[[bytes], bool] | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self.status = 0
        self.reason = ""
        self.headers: CIMultiDict[str] = CIMultiDict()

    async def ask(self, head: bytes, body: bytes | None, *, has_no_body: bool = False) -> None:
        """Ask, and wait for the answer's head; ``has_no_body`` is for a question about a head alone.

        It is closed where this raises ``NotConnected``, ``NothingSaid``, ``BrokenOff``, ``TimeoutError``.
        """
        try:
            if body is None or len(body) <= _ONE_WRITE:
                await self._send_first(head + (body or b""))
            else:
                await self._send_first(head)
                # It may have answered before it had read all of it, and what it says then counts.
                with contextlib.suppress(ConnectionError):
                    await self._send(body, self.silence)
            self._silences.begin(self)
            heard = self._heard = _Heard(has_no_body=has_no_body)
            while not heard.has_head:
                await (self._hear(heard) if self._is_more else self._arrival())
                if heard.length > _LONGEST_HEAD and not heard.has_head:
                    raise BrokenOff("the head of what it says has no end")
        except BaseException:  # who asked may have left meanwhile, too; it goes on its way
            self.close()
            raise
        self.status = heard.parser.get_status_code()
        self.reason, self.headers = heard.reason, heard.headers

    @property
    def length(self) -> int | None:
        """Bytes of the answer's body, where the server says so."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    @property
    def content_type(self) -> str:
        """The answer's, in lower case and without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def is_through(self) -> bool:
        """Whether all of the answer was taken."""
        return self._heard is None or (self._heard.is_whole and not self._heard.body)

    def piece_there(self) -> bytes:
        """What of the answer's body is there already and was not taken yet; waits for nothing."""
        heard = self._heard
        if heard is None:
            return b""
        if not heard.body and not heard.is_whole:
            try:
                self._listen(heard)
            except (BlockingIOError, ExchangeError):
                # Where it broke off, who waits for more is told.
                return heard.take()
        return heard.take()

    async def next_piece(self) -> bytes:
        """What comes next of the answer's body, as it came; empty where that was all.

        Raises ``BrokenOff``, ``TimeoutError``.
        """
        heard = self._heard
        if heard is None:
            return b""
        while not heard.body and not heard.is_whole:
            await self._hear(heard)
        return heard.take()

    async def pour(self, take: Callable[[bytes], bool]) -> None:
        """Have what comes next of the answer's body taken, piece by piece, as long as ``take`` says that it takes more.

        It is called by the event loop, and is not to wait for anything. The last piece is left for ``next_piece``, by
        which the end comes to be known. Raises as that does, and what ``take`` raises.
        """
        heard = self._heard
        if heard is None or heard.body or heard.is_whole:
            return
        self._take = take
        try:
            await self._hear(heard)
        finally:
            self._take = None

    async def read(self, most: int) -> bytes | None:
        """The rest of the body; ``None`` where it has more bytes than ``most``. Raises as ``next_piece`` does."""
        body = bytearray()
        while piece := await self.next_piece():
            body += piece
            if len(body) > most:
                return None
        return bytes(body)

    def close(self) -> None:
        """Let go of the connection. A server that is not through with its answer learns that nobody wants it."""
        if self._is_over:
            return
        self._is_over = True
        heard, self._heard = self._heard, None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(BrokenOff("nobody wants the answer any more"))
        self._connection.listen_no_more()
        self._silences.end(self)
        if heard is not None:
            # The two hold each other.
            del heard.parser
        # After an answer whose length it could not tell beforehand, llama-server ends the connection, and says no word.
        can_go_on = heard is not None and heard.can_go_on and "Content-Length" in heard.headers
        if can_go_on and self._give_back is not None:
            self._give_back(self._connection)
            return
        self._connection.close()
        if self._give_back is not None and heard is not None and heard.is_whole:
            self._give_back(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell_silence(self) -> None:
        """For the watch: the server has said nothing for too long."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(False)

    async def _send_first(self, data: bytes) -> None:
        try:
            await self._send(data, _CONNECT_SECONDS)
        except OSError as error:
            raise NotConnected(error) from None

    async def _send(self, data: bytes, seconds: float) -> None:
        """Raises ``OSError``, ``TimeoutError`` where not all of it was taken in so many ``seconds``."""
        try:
            sent = self._connection.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            async with asyncio.timeout(seconds):
                await self._connection.send_all(memoryview(data)[sent:])

    async def _hear(self, heard: _Heard) -> None:
        """Take what is there, or wait for something. Raises as ``_listen`` does, and ``TimeoutError``."""
        if not self._is_more:
            self._at_once = 0
            await self._arrival()
            return
        try:
            self._listen(heard)
        except BlockingIOError:
            self._is_more = False
        else:
            self._at_once += 1
            if self._at_once % _MOST_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _listen(self, heard: _Heard) -> None:
        """Take what is there. Raises ``BlockingIOError``, ``NothingSaid``, ``BrokenOff``."""
        if self._failure is not None:
            raise self._failure
        try:
            data = self._connection.recv(_PIECE)
        except BlockingIOError:
            raise
        except OSError as error:
            self._failure = (BrokenOff if heard.length else NothingSaid)(error.strerror or str(error))
            raise self._failure from None
        heard.length += len(data)
        self._is_more = len(data) == _PIECE
        if not data:
            self._end(heard)
            return
        try:
            heard.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if heard.is_whole:
                heard.can_go_on = False
                return
            self._failure = BrokenOff(f"what it says is no HTTP: {error}")
            raise self._failure from None

    def _end(self, heard: _Heard) -> None:
        """The server has ended the connection."""
        if heard.has_head and not heard.is_framed:
            heard.is_whole = True
        elif heard.length:
            self._failure = BrokenOff("it ended the connection before its answer was whole")
            raise self._failure
        else:
            self._failure = NothingSaid("it ended the connection and said nothing")
            raise self._failure

    async def _arrival(self) -> None:
        """Wait until something came, and was taken. Raises as ``_listen`` does, and ``TimeoutError``."""
        if self._failure is not None:
            raise self._failure
        waiter = self._waiter = asyncio.Future()
        self._connection.listen(self._arrived)
        self.waits_since = monotonic()
        try:
            if not await waiter:
                raise TimeoutError
        finally:
            self._waiter = None
            self.waits_since = math.inf

    def _arrived(self) -> None:
        """Take what came for who waits for it; where nobody does, it stays where it is, and the server notices."""
        waiter, heard = self._waiter, self._heard
        if waiter is None or waiter.done() or heard is None:
            self._connection.look_away()
            return
        try:
            self._listen(heard)
            if self._take is not None and self._is_poured(heard, self._take):
                self.waits_since = monotonic()
                return
        except BlockingIOError:
            return
        except Exception as error:  # noqa: BLE001  # it is who waits that has to know
            waiter.set_exception(error)
        else:
            waiter.set_result(True)

    def _is_poured(self, heard: _Heard, take: Callable[[bytes], bool]) -> bool:
        """Have what came taken, and tell whether more of it is to be."""
        if heard.is_whole or self._is_more:
            return False
        return not heard.body or take(heard.take())
