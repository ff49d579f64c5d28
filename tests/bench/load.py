"""Asks one path of an HTTP server on a unix socket for some seconds over some connections, and prints what came of it.

    python -m tests.bench.load SOCKET PATH CONNECTIONS SECONDS

In a process of its own, so that its work is not the server's. A connection is kept open and sends its next request
when the answer is there whole; bodies are counted, not kept. Printed as JSON: `perSecond`, `p50` and `p99`
(milliseconds from the request's first byte to the answer's last), `requests`, `bytes` (of one answer's body) and
`busy` (the share of the time in which this process used a processor: near 1, it is what is measured).
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from typing import Any

_WARM_UP_SECONDS = 0.3
_BUFFER_BYTES = 1 << 20
_MAX_HEAD_BYTES = 64 << 10
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class WrongAnswer(Exception):
    """The server did not answer as it should; no figure can come of it."""


class Connection(asyncio.BufferedProtocol):
    """One connection: a request after the other until `until`, on the loop's clock."""

    def __init__(self, path: str, since: float, until: float, buffer: memoryview) -> None:
        self.milliseconds: list[float] = []
        self.body_lengths: set[int] = set()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = f"GET {path} HTTP/1.1\r\nHost: magi\r\nAccept: application/json\r\n\r\n".encode()
        self._since = since
        self._until = until
        self._buffer = buffer
        self._head = b""
        self._left = -1  # bytes of the body that are to come; -1 while the head is
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def get_buffer(self, _hint: int) -> memoryview:
        """Return the one buffer that everything is read into."""
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        """Count what came; after an answer's last byte send the next request."""
        if self._left < 0:
            self._head += self._buffer[:count]
            head, found, body = self._head.partition(b"\r\n\r\n")
            if not found and len(head) < _MAX_HEAD_BYTES:
                return
            length = _LENGTH.search(head + b"\r\n")
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                self._end(WrongAnswer(f"not 200 with a Content-Length: {head[:300]!r}"))
                return
            self._left = int(length[1]) - len(body)
            self._head = b""
            self.body_lengths.add(int(length[1]))
        else:
            self._left -= count
        if self._left < 0:
            self._end(WrongAnswer("more bytes than the answer has"))
        elif self._left == 0:
            self._answered()

    def connection_lost(self, error: Exception | None) -> None:
        """Take it as a fault unless the time is up."""
        self._end(error or WrongAnswer("the server closed the connection"))

    def _send(self) -> None:
        assert self._transport is not None
        self._left = -1
        self._sent = time.monotonic()
        self._transport.write(self._request)

    def _answered(self) -> None:
        now = time.monotonic()
        if self._since <= self._sent and now <= self._until:
            self.milliseconds.append((now - self._sent) * 1e3)
        if now < self._until:
            self._send()
        else:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)
        if self._transport is not None:
            self._transport.abort()


async def ask(socket: str, path: str, connections: int, seconds: float) -> dict[str, Any]:
    """Ask for `seconds` after a short warm-up. Raises WrongAnswer, OSError."""
    loop = asyncio.get_running_loop()
    since = time.monotonic() + _WARM_UP_SECONDS
    # One for all: what was read into it is counted before the next read.
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    opened = [
        (await loop.create_unix_connection(lambda: Connection(path, since, since + seconds, buffer), socket))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(since - time.monotonic())
    worked = time.process_time()
    await asyncio.gather(*(connection.ended for connection in opened))
    worked = time.process_time() - worked
    milliseconds = [one for connection in opened for one in connection.milliseconds]
    lengths = {length for connection in opened for length in connection.body_lengths}
    if len(lengths) != 1 or len(milliseconds) < 2:
        raise WrongAnswer(f"{len(milliseconds)} answers, with bodies of {sorted(lengths)} bytes")
    percentiles = statistics.quantiles(milliseconds, n=100, method="inclusive")
    return {
        "perSecond": len(milliseconds) / seconds,
        "p50": percentiles[49],
        "p99": percentiles[98],
        "requests": len(milliseconds),
        "bytes": lengths.pop(),
        "busy": worked / seconds,
    }


def main() -> None:
    """Ask as the command line says."""
    socket, path, connections, seconds = sys.argv[1:]
    json.dump(asyncio.run(ask(socket, path, int(connections), float(seconds))), sys.stdout)


if __name__ == "__main__":
    main()
