"""Answers that come bit by bit: each bit is at the client when the server has said it, and not later."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.agent_process import AgentProcess, wait_until
from tests.conftest import PortRanges
from tests.proxies.conftest import MODEL, Bearer
from tests.proxies.proxy_process import Proxy, TlsConnection, running
from tests.proxies.shipped import NAME, Surroundings

TOKENS = 2500
"""As many as take some seconds."""
FOR_LONG = 15_000
"""More than are made in the time that a test takes."""
BETWEEN_LOOKS = 1.5
"""Seconds between two questions to a llama-server."""
AT_ONCE = 0.5
"""Seconds; far more than a byte takes through a proxy, and far less than a buffer takes to be full."""


@pytest.fixture(scope="module")
def server(agent: AgentProcess) -> int:
    """The port of a llama-server that the agent has started."""
    started = agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")["server"]
    assert started["state"] == "ready"
    return int(started["port"])


@pytest.fixture
def to_server(kind: str, tmp_path: Path, surroundings: Surroundings, server: int) -> Iterator[Proxy]:
    """The proxy, with one more location of the shipped form that leads to the llama-server."""
    with running(Proxy(kind, tmp_path / "proxy", surroundings, {"llama": server})) as started:
        yield started


def completion(proxy: Proxy, tokens: int, *, stream: bool) -> TlsConnection:
    """Ask the llama-server behind the proxy for as many tokens."""
    connection = proxy.connect()
    body = {"prompt": "once", "max_tokens": tokens, "stream": stream, "ignore_eos": True, "cache_prompt": False}
    headers = {"Host": NAME, "Content-Type": "application/json"}
    connection.request("POST", "/llama/v1/completions", json.dumps(body), headers)
    return connection


def events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while line := response.readline():
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").strip()


def is_busy(server: int) -> bool:
    # Asked more often than once in a second, it never looks whether the client of another request is still there.
    time.sleep(BETWEEN_LOOKS)
    with urllib.request.urlopen(f"http://127.0.0.1:{server}/slots", timeout=30) as answer:
        return any(slot["is_processing"] for slot in json.load(answer))


def test_a_streamed_completion_arrives_token_by_token(to_server: Proxy) -> None:
    connection = completion(to_server, TOKENS, stream=True)
    response = connection.getresponse()
    arrived = [(time.monotonic(), event) for event in events(response)]
    connection.close()

    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/event-stream")
    assert arrived[-1][1] == b"[DONE]"
    assert len(arrived) > TOKENS
    times = [moment for moment, _ in arrived]
    lasted = times[-1] - times[0]
    assert lasted > 1.0, "too short to tell"
    # What is held back until the end leaves tenths empty; a machine that is busy makes some of them thin.
    in_tenths = [sum(tenth <= (at - times[0]) / lasted * 10 < tenth + 1 for at in times) for tenth in range(10)]
    assert min(in_tenths) > TOKENS / 250, in_tenths
    assert sorted(in_tenths)[5] > TOKENS / 50, in_tenths


@contextlib.asynccontextmanager
async def one_word_at_a_time(port: int, said: asyncio.Queue[bytes | None]) -> AsyncIterator[None]:
    """A server that says what a test gives it, when the test gives it."""

    async def speak(request: web.Request) -> web.StreamResponse:
        kind = request.query["type"]
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        while (word := await said.get()) is not None:
            await response.write(word)
        return response

    application = web.Application()
    application.router.add_get("/words", speak)
    runner = web.AppRunner(application, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("media_type", ["text/event-stream", "application/json", "text/html", "application/x-ndjson"])
async def test_what_the_server_says_is_there_before_it_says_more(
    kind: str, tmp_path: Path, surroundings: Surroundings, unused_ports: PortRanges, media_type: str
) -> None:
    port, _ = unused_ports()
    said: asyncio.Queue[bytes | None] = asyncio.Queue()
    slowest = 0.0
    proxy = Proxy(kind, tmp_path / "proxy", surroundings, {"words": port})
    async with one_word_at_a_time(port, said):
        await asyncio.to_thread(proxy.start)
        connection = proxy.connect()
        try:
            asking = {"Host": NAME, "Accept-Encoding": "gzip"}
            await asyncio.to_thread(connection.request, "GET", f"/words/words?type={media_type}", None, asking)
            connection.sock.settimeout(5)
            response = await asyncio.to_thread(connection.getresponse)
            assert response.getheader("Content-Encoding") is None
            for word in (b"a\n", b"b\n", b"c" * 10_000 + b"\n", b"d\n"):
                began = time.monotonic()
                said.put_nowait(word)
                assert await asyncio.to_thread(response.readline) == word
                slowest = max(slowest, time.monotonic() - began)
            said.put_nowait(None)
            assert await asyncio.to_thread(response.read) == b""
        finally:
            connection.close()
            await asyncio.to_thread(proxy.stop)
    assert slowest < AT_ONCE


def test_the_agents_events_arrive_when_they_happen(proxy: Proxy, agent: AgentProcess, bearer: Bearer) -> None:
    agent.must("PUT", f"/api/models/{MODEL}/tier", {"tier": "balanced"})
    connection = proxy.connect()
    connection.request("GET", "/magi/api/events", None, {"Host": NAME, "Accept": "text/event-stream", **bearer()})
    response = connection.getresponse()
    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/event-stream")
    happened = threading.Event()

    def listen() -> None:
        for line in response:
            if MODEL.encode() in line:
                happened.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        agent.must("PUT", f"/api/models/{MODEL}/tier", {"tier": "fast"})
        assert happened.wait(AT_ONCE), "the event is not there"
    finally:
        connection.sock.shutdown(socket.SHUT_RDWR)
        listener.join()
        connection.close()


def test_listeners_that_leave_leave_no_stream_behind(proxy: Proxy, bearer: Bearer) -> None:
    """There are 256 places: were one kept for each that has left, there would soon be none."""
    for _ in range(270):
        connection = proxy.connect()
        connection.request("GET", "/magi/api/events", None, {"Host": NAME, **bearer()})
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline() == b"retry: 2000\n"
        connection.close()


def test_an_answer_that_takes_its_time_arrives(proxy: Proxy, bearer: Bearer) -> None:
    """The agent says nothing until the server is up, or is down."""
    for verb, state in (("restart", "ready"), ("stop", "stopped"), ("start", "ready")):
        path = f"/magi/api/models/servers/{MODEL}/{verb}?wait=60"
        done = proxy.ask("POST", path, headers=bearer())
        assert (done.status, done.body["server"]["state"]) == (200, state)
    begun = proxy.ask("POST", f"/magi/api/models/servers/{MODEL}/restart", headers=bearer())
    assert (begun.status, begun.headers["location"]) == (202, f"/magi/api/models/servers/{MODEL}")
    wait_until(lambda: proxy.ask("GET", begun.headers["location"], headers=bearer()).body["isReady"], "it is up again")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_leaves_no_generation_behind(to_server: Proxy, server: int, stream: bool) -> None:
    connection = completion(to_server, FOR_LONG, stream=stream)
    if stream:
        next(events(connection.getresponse()))
    wait_until(lambda: is_busy(server), "the generation begins")

    connection.close()

    wait_until(lambda: not is_busy(server), "the llama-server stops", 8.0)
