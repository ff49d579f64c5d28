"""Asks HTTP servers on loopback for models' answers, streamed or not, and notes when what came.

Nothing is parsed before an answer is whole but for its head and its end, so that little of the time is the asker's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from tests.bench.load import WrongAnswer

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_TYPE = re.compile(rb"\r\ncontent-type: *([^\r]*)\r\n", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked\r\n", re.IGNORECASE)
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_EVENT = b"data:"
_EVENT_STREAM = b"text/event-stream"
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Said:
    """One answer, whole."""

    status: int
    content_type: bytes
    body: bytes
    first: float
    """Seconds from the question to the first event's first byte; in an answer without events, to its body's."""
    whole: float
    """Seconds from the question to the last byte."""


def question(path: str, body: dict[str, Any]) -> bytes:
    """A request that asks ``path`` with a JSON object."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Asker:
    """Asks a server at a port one question after the other, over a connection that is kept for as long as it keeps."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: _Connection | None = None

    async def ask(self, request: bytes) -> Said:
        """The answer; to connect is not in its times. Raises ``WrongAnswer`` where it breaks off, and ``OSError``."""
        async with asyncio.timeout(_ANSWER_SECONDS):
            if self._connection is not None and not self._connection.is_over:
                with contextlib.suppress(_Closed):
                    return await self._connection.ask(request)
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
            return await self._connection.ask(request)

    async def must(self, request: bytes) -> Said:
        """The answer, which has to be a success. Raises as ``ask`` does."""
        said = await self.ask(request)
        if said.status != 200:
            raise WrongAnswer(f"status {said.status}: {said.body[:300]!r}")
        return said

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.cut()


class _Closed(WrongAnswer):
    """Ended before anything was answered: llama-server closes a connection after a stream, and does not say so."""


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_over = False
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[Said] | None = None
        self._received = bytearray()
        self._body_at = 0
        self._has_events = False
        self._ends_at = -1  # of what is received; -1 where a last chunk says so
        self._asked = self._first = 0.0

    async def ask(self, request: bytes) -> Said:
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._body_at, self._ends_at, self._first = 0, -1, 0.0
        self._asked = time.perf_counter()
        self._transport.write(request)
        return await self._answered

    def cut(self) -> None:
        self.is_over = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._body_at and not self._take_head():
            return
        if not self._first and self._has_begun():
            self._first = time.perf_counter() - self._asked
        if len(received) >= self._ends_at if self._ends_at >= 0 else received.endswith(_LAST_CHUNK):
            self._end()

    def connection_lost(self, _: Exception | None) -> None:
        self.is_over = True
        if self._answered is not None and not self._answered.done():
            said = bytes(self._received[-300:])
            self._answered.set_exception(WrongAnswer(f"broke off: {said!r}") if said else _Closed("nothing was said"))

    def _has_begun(self) -> bool:
        if self._has_events:
            return self._received.find(_EVENT, self._body_at) >= 0
        return len(self._received) > self._body_at or self._ends_at == self._body_at

    def _take_head(self) -> bool:
        """Whether the head is there."""
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._body_at = end + 4
        kind = _TYPE.search(self._received, 0, end + 2)
        self._has_events = kind is not None and kind[1].startswith(_EVENT_STREAM)
        if length := _LENGTH.search(self._received, 0, end + 2):
            self._ends_at = self._body_at + int(length[1])
        elif _CHUNKED.search(self._received, 0, end + 2) is None:
            self._fail(WrongAnswer(f"neither a length nor chunks: {bytes(self._received[:300])!r}"))
            return False
        return True

    def _end(self) -> None:
        whole = time.perf_counter() - self._asked
        head, body = bytes(self._received[: self._body_at - 2]), bytes(self._received[self._body_at :])
        if _CLOSES.search(head):
            self.cut()
        kind = _TYPE.search(head)
        try:
            content = body if self._ends_at >= 0 else unchunked(body)
        except ValueError:
            self._fail(WrongAnswer(f"no chunks: {body[:300]!r}"))
            return
        if self._ends_at >= 0 and len(self._received) > self._ends_at:
            self._fail(WrongAnswer("more bytes than the answer has"))
        elif self._answered is not None and not self._answered.done():
            self._answered.set_result(Said(int(head[9:12]), kind[1] if kind else b"", content, self._first, whole))

    def _fail(self, error: WrongAnswer) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)
        self.cut()


def unchunked(body: bytes) -> bytes:
    """What chunks hold (RFC 9112, 7.1). Raises ``ValueError`` where they are not whole, or more follows."""
    pieces, at = [], 0
    while True:
        line_end = body.index(b"\r\n", at)
        length = int(body[at:line_end].partition(b";")[0], 16)
        at = line_end + 2
        if body[at + length : at + length + 2] != b"\r\n":
            raise ValueError("a chunk is shorter or longer than it says")
        pieces.append(body[at : at + length])
        at += length + 2
        if not length:
            break
    if at != len(body):
        raise ValueError("more follows the last chunk")
    return b"".join(pieces)
