"""Answers that go on: one JSON document after the other, as they come, until somebody ends it.

Two forms, of which the caller's ``Accept`` chooses: server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html), and one document in each line (NDJSON). An answer ends
with its items, when the client leaves, when it does not read, when its caller may no longer see what is streamed, and
at once when the agent stops. It holds no queue: the next item is asked for when the one before is on its way, so what a
client costs is one full buffer of its socket, and whatever ``items`` keeps for it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter

from magi_agent.api.connection import Connection
from magi_agent.api.exchange import CALLER
from magi_agent.errors import MagiError, ServiceUnavailable, TooManyStreams

_LOG: Final = logging.getLogger(__name__)
_KEEP_ALIVE: Final = 15.0
"""Seconds between two signs of life, and between two looks at the caller's rights; proxies cut after a minute."""
_PATIENCE: Final = 30.0
"""Seconds that a client may leave its socket's buffer full."""
_LAST_WORD: Final = 1.0
"""Seconds that the mark of an answer's end may take to be on its way."""
_MOST: Final = 256
"""Streams at a time: half of the connections that there may be."""
_MOST_OF_ONE: Final = 128
"""Of these, so many of one caller: nobody can have all."""
_RETRY_AFTER: Final = 5
_TURN: Final = 64
"""Items that are written, where nothing has to be waited for, before others have their turn."""


class StreamForm(StrEnum):
    """How items stand on the wire: the media type."""

    SSE = "text/event-stream"
    NDJSON = "application/x-ndjson"


class StreamEnd(StrEnum):
    """Why a stream ended, in words that follow "until"."""

    ENDED = "everything was said"
    LEFT = "the client left"
    UNREAD = f"the client had not read for {_PATIENCE:g} s"
    DENIED = "the caller might no longer read it"
    STOPPED = "the agent stopped"
    FAILED = "it failed"


class _Gone(Exception):
    """There is nobody to write to."""


class _NotRead(Exception):
    """The socket's buffer was full for too long."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that is streamed.

    Without ``data``, it only says up to which ``id`` the client has everything: a browser that connects again then asks
    for what came after that.
    """

    data: bytes
    """One JSON document in one line."""
    event: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if b"\n" in self.data or b"\r" in self.data:
            raise ValueError("what is streamed must be one line")


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What became of a stream."""

    why: StreamEnd
    seconds: float
    items: int
    bytes_sent: int


class StreamAnswer(web.StreamResponse):
    """An answer that is streamed once its headers are complete, as a file would be."""

    def __init__(
        self, streams: "Streams", items: AsyncIterator[Item], form: StreamForm, whom: str, share: "Share"
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.content_type = form.value
        if form is StreamForm.SSE:
            self.charset = "utf-8"
        self.may_go_on: Callable[[], bool] = lambda: True
        """Whether the caller may still see what is streamed."""
        self.whom = whom
        self.share = share
        self.when_ended: Callable[[StreamReport], None] = lambda _: None
        self._streams = streams
        self._items = items
        self._form = form
        self._why: StreamEnd | None = None
        self._woken = asyncio.Event()
        self._items_sent = 0
        self._bytes_sent = 0

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the headers, and then all that is to be sent."""
        if self.prepared:
            return await super().prepare(request)
        began = asyncio.get_running_loop().time()
        self._streams.begun(self)
        try:
            writer = await super().prepare(request)
            if writer is not None and request.method != "HEAD":
                await self._send_all(cast(Connection, request.protocol), cast(StreamWriter, writer))
            else:
                await self._close_items()
        finally:
            self._streams.ended(self)
            seconds = asyncio.get_running_loop().time() - began
            self.when_ended(StreamReport(self._why or StreamEnd.ENDED, seconds, self._items_sent, self._bytes_sent))
        return writer

    def end(self, why: StreamEnd) -> None:
        """End it, wherever it is; the first reason counts."""
        self._why = self._why or why
        self._woken.set()

    async def _send_all(self, connection: Connection, writer: StreamWriter) -> None:
        pump = asyncio.create_task(self._pump(connection, writer), name="stream")
        pump.add_done_callback(lambda _: self._woken.set())
        connection.when_lost(partial(self.end, StreamEnd.LEFT))
        try:
            while not (self._why or pump.done()):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_KEEP_ALIVE):
                        await self._woken.wait()
                        continue
                await self._show_life(connection, writer)
        finally:
            connection.when_lost(None)
            pump.cancel()
            # What broke is logged also where nobody listens any more.
            reason = _reason((await asyncio.gather(pump, return_exceptions=True))[0])
            self._why = self._why or reason
        is_whole = self._why not in (StreamEnd.LEFT, StreamEnd.UNREAD, StreamEnd.FAILED)
        if is_whole and not connection.writing_paused:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD):
                    return await self.write_eof()
        # What is cut off without the mark of its end, nobody takes for whole.
        if connection.transport is not None:
            connection.transport.abort()
        return None

    async def _pump(self, connection: Connection, writer: StreamWriter) -> None:
        in_a_row = 0
        try:
            await self._write(connection, writer, _FORMS[self._form].beginning)
            async for item in self._items:
                framed = _FORMS[self._form].framed(item)
                if not framed:
                    continue
                await self._write(connection, writer, framed)
                self._items_sent += bool(item.data)
                in_a_row += 1
                if in_a_row % _TURN == 0:
                    await asyncio.sleep(0)
        finally:
            await self._close_items()

    async def _write(self, connection: Connection, writer: StreamWriter, framed: bytes) -> None:
        try:
            await writer.write(framed, drain=False)
            self._bytes_sent += len(framed)
            if connection.writing_paused:
                async with asyncio.timeout(_PATIENCE):
                    await writer.drain()
        except TimeoutError:
            raise _NotRead from None
        except ConnectionError:
            raise _Gone from None

    async def _show_life(self, connection: Connection, writer: StreamWriter) -> None:
        if not self.may_go_on():
            self.end(StreamEnd.DENIED)
        elif connection.transport is not None and not connection.transport.get_write_buffer_size():
            # Where something is on its way still, the client has its sign of life.
            with suppress(ConnectionError):
                await writer.write(_FORMS[self._form].keep_alive, drain=False)

    async def _close_items(self) -> None:
        if isinstance(self._items, AsyncGenerator):
            await self._items.aclose()


@dataclass(frozen=True, slots=True)
class Share:
    """How many streams of one kind one caller may have at a time."""

    what: str
    """They, in words."""
    most: int


ANY: Final = Share("streams", _MOST_OF_ONE)
"""Streams of whatever kind."""


class Streams:
    """All streams of one application: how many there may be, and their end with it."""

    def __init__(self) -> None:
        self._open: set[StreamAnswer] = set()
        self._are_closed = False

    def admit(self, whom: str, share: Share) -> None:
        """Raise ``ServiceUnavailable`` where there is no place for another one, ``TooManyStreams`` where for them."""
        if self._are_closed:
            raise ServiceUnavailable("streams", "the agent is stopping; ask again when it is back", _RETRY_AFTER)
        if len(self._open) >= _MOST:
            raise ServiceUnavailable(
                "streams", f"{_MOST} streams are open, which is the most; close one, or ask again later", _RETRY_AFTER
            )
        own = [stream.share for stream in self._open if stream.whom == whom]
        for counted, found in ((ANY, len(own)), (share, own.count(share))):
            if found >= counted.most:
                raise TooManyStreams(counted.what, counted.most, whom)

    def begun(self, stream: StreamAnswer) -> None:
        """Count a stream."""
        self._open.add(stream)
        if self._are_closed:
            stream.end(StreamEnd.STOPPED)

    def ended(self, stream: StreamAnswer) -> None:
        """Count it no more."""
        self._open.discard(stream)

    async def close(self, _: web.Application) -> None:
        """End all of them, at once: clients of the next agent come back and say where they were."""
        self._are_closed = True
        for stream in self._open:
            stream.end(StreamEnd.STOPPED)


STREAMS: Final = web.AppKey("streams", Streams)


def add_streams(application: web.Application) -> None:
    """Make ``stream`` usable in the handlers of ``application``."""
    application[STREAMS] = Streams()
    application.on_shutdown.append(application[STREAMS].close)


def form_of(request: web.BaseRequest, default: StreamForm) -> StreamForm:
    """The form that the caller's ``Accept`` prefers; ``default`` where it names none."""
    best, chosen = 0.0, default
    for entry in ",".join(request.headers.getall("Accept", [])).split(","):
        media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
        if media_type not in _FORMS:
            continue
        quality = _quality(parameters)
        if quality > best:
            best, chosen = quality, StreamForm(media_type)
    return chosen


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            with suppress(ValueError):
                return float(value)
            return 0.0
    return 1.0


async def stream(
    request: web.Request, items: AsyncIterator[Item], form: StreamForm, share: Share = ANY
) -> StreamAnswer:
    """The answer that sends ``items``, which are closed however it ends, if they are a generator.

    Raises ``ServiceUnavailable`` where there are too many streams already, and ``TooManyStreams`` where the caller has
    too many. What ``items`` raise later cuts the answer off, and is in the log.
    """
    refuse_another(request, share)
    return StreamAnswer(request.app[STREAMS], items, form, _whom(request), share)


def refuse_another(request: web.Request, share: Share) -> None:
    """Raise what ``stream`` would, before anything is done for a stream that there is no place for."""
    request.app[STREAMS].admit(_whom(request), share)


def _whom(request: web.Request) -> str:
    return request[CALLER].whom or request[CALLER].name


def _reason(outcome: BaseException | None) -> StreamEnd:
    """Why the pump ended; what nobody foresaw is logged whole."""
    match outcome:
        case None:
            return StreamEnd.ENDED
        case _NotRead():
            return StreamEnd.UNREAD
        case _Gone():
            return StreamEnd.LEFT
        case MagiError():
            _LOG.warning("a stream was cut off: %s", outcome)
        case asyncio.CancelledError():
            pass
        case BaseException():
            _LOG.error("a stream met a defect", exc_info=outcome)
    return StreamEnd.FAILED


@dataclass(frozen=True, slots=True)
class _Form:
    beginning: bytes
    keep_alive: bytes
    framed: Callable[[Item], bytes]


def _as_event(item: Item) -> bytes:
    lines = []
    if item.id is not None:
        lines.append(b"id: %b\n" % item.id.encode())
    if item.data:
        if item.event is not None:
            lines.append(b"event: %b\n" % item.event.encode())
        lines.append(b"data: %b\n" % item.data)
    return b"".join((*lines, b"\n"))


def _as_line(item: Item) -> bytes:
    return item.data + b"\n" if item.data else b""


_FORMS: Final = {
    # A browser comes back after two seconds, where the connection is lost.
    StreamForm.SSE: _Form(b"retry: 2000\n\n", b": keep-alive\n\n", _as_event),
    StreamForm.NDJSON: _Form(b"\n", b"\n", _as_line),
}
