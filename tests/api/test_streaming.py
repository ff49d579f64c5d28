"""Answers that go on: what is on the wire in both forms, and everything that ends one, on both real listeners."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

import pytest
import pytest_asyncio
from aiohttp import web

from magi_agent.api import streaming
from magi_agent.api.access import Caller
from magi_agent.api.answering import answering
from magi_agent.api.connection import Connection
from magi_agent.api.cors import CrossOrigin
from magi_agent.api.counted_requests import CountedRequests
from magi_agent.api.listeners import Listeners
from magi_agent.api.routes import Access
from magi_agent.api.streaming import Item, StreamForm, add_streams, form_of, stream
from magi_agent.configuration import Configuration
from magi_agent.errors import ServiceUnavailable
from magi_agent.metrics.request_counts import RequestCounts
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import Settings
from tests.conftest import PortRanges

QUICK = 2.0
"""Seconds; far less than the five that the API's stop has for requests, and than any patience."""
LARGE = b'"' + b"x" * 32_768 + b'"'


@dataclass
class Source:
    """What the handler streams: what a test puts into it."""

    given: asyncio.Queue[Item | Exception | None] = field(default_factory=lambda: asyncio.Queue())
    begun: int = 0
    closed: int = 0
    taken: int = 0

    async def items(self) -> AsyncIterator[Item]:
        self.begun += 1
        try:
            while (item := await self.given.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                self.taken += 1
                yield item
        finally:
            self.closed += 1

    async def stubborn(self) -> AsyncIterator[Item]:
        """Breaks when it is ended."""
        self.begun += 1
        try:
            await self.given.get()
            yield Item(b"1")
        finally:
            self.closed += 1
            raise RuntimeError("a bug in the end")

    async def flood(self, data: bytes) -> AsyncIterator[Item]:
        """Never ends, and never waits."""
        self.begun += 1
        try:
            while True:
                self.taken += 1
                yield Item(data)
        finally:
            self.closed += 1


@dataclass
class Served:
    """An application behind the agent's own listeners."""

    source: Source
    listeners: Listeners
    settings: Settings
    listener: str
    caller: Caller

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.listener == "unix":
            return await asyncio.open_unix_connection(str(self.settings.socket))
        assert self.settings.tcp is not None
        return await asyncio.open_connection(self.settings.tcp.host, self.settings.tcp.port)

    @contextlib.asynccontextmanager
    async def asked(self, path: str = "/items", **headers: str) -> AsyncIterator[Answer]:
        reader, writer = await self.connect()
        try:
            method, _, where = path.rpartition(" ")
            told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
            writer.write(f"{method or 'GET'} {where} HTTP/1.1\r\nHost: localhost\r\n{told}\r\n".encode())
            async with asyncio.timeout(30):
                head = await reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")[:-2]
            told_us = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            yield Answer(int(status.split()[1]), told_us, reader, writer)
        finally:
            writer.close()

    def connections(self) -> list[Connection]:
        runner = self.listeners._runner
        assert runner is not None
        assert runner.server is not None
        return [connection for connection in runner.server.connections if isinstance(connection, Connection)]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def read_nothing(self) -> None:
        cast(asyncio.Transport, self.writer.transport).pause_reading()

    async def chunk(self) -> bytes | None:
        """The next chunk; ``None`` at the mark of the end. Raises ``IncompleteReadError`` where it is cut off."""
        async with asyncio.timeout(30):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            content = await self.reader.readexactly(size + 2)
        return content[:-2] if size else None

    async def rest(self) -> list[bytes]:
        chunks = []
        while (chunk := await self.chunk()) is not None:
            chunks.append(chunk)
        return chunks


async def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def served(tmp_path, unused_ports: PortRanges, listener: str) -> AsyncIterator[Served]:
    port, _ = unused_ports()
    settings = load_settings(
        {"socket": str(tmp_path / "api.sock"), "tcp": f"127.0.0.1:{port}", "cors_origins": "https://ui.example"}, {}
    )
    source = Source()

    async def items(request: web.Request) -> web.StreamResponse:
        return await stream(request, source.items(), form_of(request, StreamForm.SSE), streaming.ANY)

    async def flood(request: web.Request) -> web.StreamResponse:
        data = b"1" if request.query_string else LARGE
        share = streaming.Share("dear ones", 1) if request.query_string == "dear" else streaming.ANY
        return await stream(request, source.flood(data), StreamForm.NDJSON, share)

    async def stubborn(request: web.Request) -> web.StreamResponse:
        return await stream(request, source.stubborn(), StreamForm.SSE)

    access: dict[object, Access] = {items: Access.READ, flood: Access.READ}
    cross_origin = CrossOrigin(Configuration(settings, None))
    counted = CountedRequests([], RequestCounts())
    application = web.Application(middlewares=[answering(lambda _: made.caller, access, cross_origin, counted)])
    add_streams(application)
    application.router.add_get("/items", items)
    application.router.add_get("/flood", flood)
    application.router.add_get("/stubborn", stubborn)
    caller = Caller("a test", Access.ADMIN)
    made = Served(source, Listeners(application, settings, {}), settings, listener, caller)
    await made.listeners.start()
    yield made
    await made.listeners.stop()
    assert source.closed == source.begun, "what is streamed is closed"


async def test_server_sent_events(served: Served) -> None:
    async with served.asked() as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-accel-buffering"] == "no"
        assert await answer.chunk() == b"retry: 2000\n\n", "headers and a beginning come before anything happens"
        served.source.given.put_nowait(Item(b'{"a":1}', event="changed", id="x-1"))
        assert await answer.chunk() == b'id: x-1\nevent: changed\ndata: {"a":1}\n\n'
        served.source.given.put_nowait(Item(b"2"))
        assert await answer.chunk() == b"data: 2\n\n"
        served.source.given.put_nowait(Item(b"", id="x-3"))
        assert await answer.chunk() == b"id: x-3\n\n"
        served.source.given.put_nowait(None)
        assert await answer.rest() == []


async def test_lines_of_json(served: Served) -> None:
    async with served.asked(Accept="application/x-ndjson") as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert await answer.chunk() == b"\n"
        for item in (Item(b'{"a":1}', event="changed", id="x-1"), Item(b"", id="x-2"), Item(b"3"), None):
            served.source.given.put_nowait(item)
        assert await answer.rest() == [b'{"a":1}\n', b"3\n"]


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "text/event-stream"),
        ("*/*", "text/event-stream"),
        ("application/json", "text/event-stream"),
        ("text/event-stream", "text/event-stream"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("Application/X-NDJSON;q=0.5, */*", "application/x-ndjson"),
        ("application/x-ndjson;q=0.5, text/event-stream;q=0.6", "text/event-stream"),
        ("text/event-stream;q=0.1,application/x-ndjson; q=0.2", "application/x-ndjson"),
        ("application/x-ndjson;q=0", "text/event-stream"),
        ("application/x-ndjson;q=many", "text/event-stream"),
        (";;,,q=", "text/event-stream"),
    ],
)
async def test_what_a_caller_accepts(served: Served, accept: str, form: str) -> None:
    served.source.given.put_nowait(None)
    async with served.asked(Accept=accept) as answer:
        assert answer.headers["content-type"].partition(";")[0] == form


async def test_a_stream_has_the_headers_of_every_answer(served: Served) -> None:
    served.source.given.put_nowait(None)
    async with served.asked(X_Request_ID="me-1", Origin="https://ui.example") as answer:
        assert answer.headers["x-request-id"] == "me-1"
        assert answer.headers["x-response-time"].endswith("ms")
        assert answer.headers["access-control-allow-origin"] == "https://ui.example"


async def test_the_connection_of_a_stream_that_ended_is_used_again(served: Served) -> None:
    async with served.asked() as answer:
        served.source.given.put_nowait(None)
        await answer.rest()
        answer.writer.write(b"GET /items HTTP/1.1\r\nHost: localhost\r\n\r\n")
        served.source.given.put_nowait(None)
        async with asyncio.timeout(30):
            assert (await answer.reader.readline()).startswith(b"HTTP/1.1 200")


async def test_head_streams_nothing(served: Served) -> None:
    async with served.asked("HEAD /items") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert served.source.begun == 0


async def test_a_client_of_http_1_0_has_the_items_without_chunks(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET /items HTTP/1.0\r\nAccept: application/x-ndjson\r\n\r\n")
    served.source.given.put_nowait(Item(b"1"))
    served.source.given.put_nowait(None)
    async with asyncio.timeout(30):
        assert (await reader.read()).endswith(b"\r\n\r\n\n1\n")
    writer.close()


def test_what_is_no_line_is_refused() -> None:
    for data in (b"a\nb", b"a\rb"):
        with pytest.raises(ValueError, match="one line"):
            Item(data)


@pytest.mark.parametrize(
    ("accept", "sign"), [("text/event-stream", b": keep-alive\n\n"), ("application/x-ndjson", b"\n")]
)
async def test_signs_of_life(served: Served, monkeypatch: pytest.MonkeyPatch, accept: str, sign: bytes) -> None:
    monkeypatch.setattr(streaming, "_KEEP_ALIVE", 0.05)
    async with served.asked(Accept=accept) as answer:
        assert await answer.chunk()
        assert [await answer.chunk() for _ in range(3)] == [sign] * 3


@pytest.mark.parametrize("half", [False, True])
async def test_it_ends_when_the_client_leaves(served: Served, half: bool) -> None:
    async with served.asked() as answer:
        await answer.chunk()
        if half:
            answer.writer.write_eof()
        else:
            answer.writer.close()
        await until(lambda: served.source.closed == 1, "the stream ended", QUICK)


async def test_a_client_that_leaves_while_much_is_on_its_way(served: Served) -> None:
    async with served.asked("/flood") as answer:
        await until(lambda: any(connection.writing_paused for connection in served.connections()), "it is full")
        answer.writer.transport.abort()
        await until(lambda: served.source.closed == 1, "the stream ended", QUICK)


async def test_it_ends_at_once_when_the_agent_stops(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that read, and those that do not."""
    monkeypatch.setattr(streaming, "_LAST_WORD", 30.0)
    async with contextlib.AsyncExitStack() as clients:
        answers = [await clients.enter_async_context(served.asked()) for _ in range(20)]
        full = [await clients.enter_async_context(served.asked("/flood")) for _ in range(3)]
        for answer in full:
            answer.read_nothing()
        await until(lambda: served.source.begun == 23, "all have begun")
        await until(lambda: sum(one.writing_paused for one in served.connections()) == len(full), "three are full")
        began = time.monotonic()

        await served.listeners.stop()

        assert time.monotonic() - began < QUICK
        assert served.source.closed == 23
        for answer in answers:
            assert await answer.rest() == [b"retry: 2000\n\n"], "whole, with the mark of its end"


async def test_a_stream_that_comes_while_the_agent_stops(served: Served) -> None:
    async with served.asked() as answer:
        await answer.chunk()
        application = served.listeners._application
        await application[streaming.STREAMS].close(application)
        await answer.rest()
        async with served.asked() as late:
            assert late.status == 503
            assert late.headers["retry-after"] == "5"


async def test_too_many_streams(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_MOST", 2)
    async with served.asked() as first, served.asked() as second:
        await first.chunk()
        await second.chunk()
        async with served.asked() as third:
            assert third.status == 503
            assert third.headers["retry-after"] == "5"
            body = await third.reader.readexactly(int(third.headers["content-length"]))
            assert b'"error":"ServiceUnavailable"' in body
            assert b'"details":{"service":"streams"}' in body
        second.writer.close()
        await until(lambda: served.source.closed == 1, "one has left")
        async with served.asked() as fourth:
            assert fourth.status == 200


async def test_nobody_can_have_all_streams(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ANY", streaming.Share("streams", 2))
    served.caller = Caller("uid 1000 (pid 7)", Access.READ, whom="uid 1000")
    async with served.asked() as first, served.asked() as second:
        await first.chunk()
        await second.chunk()
        served.caller = Caller("uid 1000 (pid 8)", Access.READ, whom="uid 1000")
        async with served.asked() as third:
            assert third.status == 429
            assert third.headers["retry-after"] == "5"
            body = json.loads(await third.reader.readexactly(int(third.headers["content-length"])))
            assert (body["error"], body["details"]) == ("TooManyStreams", {"most": 2, "of": "uid 1000"})
            assert body["message"].startswith("uid 1000 has 2 streams open, which is the most that one may have")
        served.caller = Caller("uid 1001 (pid 9)", Access.READ, whom="uid 1001")
        async with served.asked() as of_another:
            assert of_another.status == 200
        served.caller = Caller("uid 1000 (pid 8)", Access.READ, whom="uid 1000")
        second.writer.close()
        await until(lambda: served.source.closed == 2, "two have left")
        async with served.asked() as fourth:
            assert fourth.status == 200


async def test_of_what_costs_more_one_has_fewer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ANY", streaming.Share("streams", 3))
    async with served.asked("/flood?dear"), served.asked():
        async with served.asked("/flood?dear") as dear:
            body = json.loads(await dear.reader.readexactly(int(dear.headers["content-length"])))
            assert (dear.status, body["message"].split(",")[0]) == (429, "a test has 1 dear ones open")
        async with served.asked(), served.asked() as beyond:
            assert beyond.status == 429


async def test_who_does_not_read_is_dropped_and_holds_little(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PATIENCE", 1.0)
    async with served.asked("/flood") as answer:
        answer.read_nothing()
        # What came with the headers was read already, and made room.
        await asyncio.sleep(0.1)
        await until(lambda: any(connection.writing_paused for connection in served.connections()), "it is full")
        [connection] = served.connections()
        assert connection.transport is not None
        taken = served.source.taken
        assert connection.transport.get_write_buffer_size() < 65_536 + 2 * len(LARGE)
        await asyncio.sleep(0.2)
        assert served.source.taken == taken, "nothing more is asked for meanwhile"
        assert served.source.closed == 0
        await until(lambda: served.source.closed == 1, "it is dropped", QUICK)
        cast(asyncio.Transport, answer.writer.transport).resume_reading()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await answer.rest()


async def test_who_reads_slowly_is_served_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PATIENCE", 1.0)
    async with served.asked("/flood") as answer:
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            await answer.chunk()
            await asyncio.sleep(0.002)
        assert served.source.closed == 0


async def test_a_stream_that_never_waits_lets_others_have_their_turn(served: Served) -> None:
    async with served.asked("/flood?small") as answer:
        most = 0
        for _ in range(1000):
            before = served.source.taken
            await asyncio.sleep(0)
            most = max(most, served.source.taken - before)
        assert served.source.taken > 1000
        assert most <= 128
        answer.writer.transport.abort()


async def test_it_ends_when_its_caller_may_no_longer_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_KEEP_ALIVE", 0.05)
    async with served.asked() as answer:
        assert await answer.chunk() == b"retry: 2000\n\n"
        assert await answer.chunk() == b": keep-alive\n\n"
        served.caller = Caller("a test", Access.INFER)
        while (chunk := await answer.chunk()) is not None:
            assert chunk == b": keep-alive\n\n"
        assert served.source.closed == 1


async def test_a_part_that_cannot_go_on_cuts_the_answer_off(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with served.asked() as answer:
        served.source.given.put_nowait(ServiceUnavailable("journal", "the journal is gone"))
        with pytest.raises(asyncio.IncompleteReadError):
            await answer.rest()
    assert "a stream was cut off: the journal is gone" in caplog.text


async def test_a_defect_cuts_the_answer_off_and_is_logged_whole(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async with served.asked() as answer:
        served.source.given.put_nowait(RuntimeError("a bug"))
        with pytest.raises(asyncio.IncompleteReadError):
            await answer.rest()
    [record] = [record for record in caplog.records if record.exc_info]
    assert "a stream met a defect" in record.getMessage()
    caplog.clear()


async def test_a_defect_in_the_clearing_away_is_logged_too(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with served.asked("/stubborn") as answer:
        await answer.chunk()
        await until(lambda: served.source.begun == 1, "it has begun")
    await until(lambda: "a stream met a defect" in caplog.text, "it is logged")
    caplog.clear()


async def test_the_log_says_how_long_it_was_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "magi_agent.api")
    async with served.asked(X_Request_ID="me-2") as answer:
        await answer.chunk()
        served.source.given.put_nowait(Item(b"1"))
        await answer.chunk()
        assert not [record for record in caplog.records if "/items" in record.getMessage()]
        answer.writer.close()
        await until(lambda: served.source.closed == 1, "the stream ended")
    await until(lambda: "streamed" in caplog.text, "it is logged")
    [record] = [record for record in caplog.records if "/items" in record.getMessage()]
    said = record.getMessage()
    assert said.startswith("GET /items: 200, streamed 1 items, 22 bytes in 0.")
    assert said.endswith(" s, until the client left, for a test")
    assert vars(record)["magi_request_id"] == "me-2"


async def test_nothing_is_left_of_streams_that_ended(served: Served) -> None:
    async def one() -> None:
        async with served.asked() as answer:
            await answer.chunk()

    for _ in range(50):
        await one()
    await until(lambda: served.source.closed == 50, "all ended")
    await until(lambda: not served.connections(), "all connections are closed")
    gc.collect()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "stream"]
    assert not served.listeners._application[streaming.STREAMS]._open
    assert not [thing for thing in gc.get_objects() if isinstance(thing, streaming.StreamAnswer)]
