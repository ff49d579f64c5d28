"""What servers answer, as metrics: aiohttp's own servers play those that a real llama-server is not."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from magi_agent.metrics.server_scrapes import ServerScrapes
from magi_agent.servers import self_reports as module
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import AtPort, Reach
from magi_agent.servers.self_reports import ReadyServer, SelfReports
from tests.conftest import PortRanges
from tests.metrics.pictures import ANSWER
from tests.servers.played_servers import Handler, Serve, playing


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with playing() as play:
        yield play


@pytest.fixture
async def connections() -> AsyncIterator[ServerConnections]:
    opened = ServerConnections()
    yield opened
    opened.close()


def scrapes_of(connections: ServerConnections, servers: dict[str, Reach]) -> ServerScrapes:
    def ready() -> dict[str, ReadyServer]:
        return {model_id: ReadyServer(reach, "run") for model_id, reach in servers.items()}

    return ServerScrapes(SelfReports(connections, ready))


async def good(_: web.Request) -> web.Response:
    return web.Response(body=ANSWER)


async def silent(_: web.Request) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(1000):
        await response.write(b"#\n")
        await asyncio.sleep(0.05)
    return response


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b"# words\n" * 10_000)
    return response


async def broken(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"# a part")
    assert request.transport is not None
    request.transport.abort()
    return response


async def elsewhere(_: web.Request) -> web.Response:
    raise web.HTTPFound("/health")


async def no_metrics(_: web.Request) -> web.Response:
    return web.json_response({"error": "this server does not support metrics"}, status=501)


async def packed(_: web.Request) -> web.Response:
    return web.Response(body=gzip.compress(b"# " + b"a" * (50 << 20)), headers={"Content-Encoding": "gzip"})


@pytest.mark.parametrize(
    ("handler", "problem"),
    [
        (silent, "it did not answer within 2 seconds"),
        (drip, "it did not answer within 2 seconds"),
        (endless, "its answer is larger than 1048576 bytes"),
        (broken, "it cannot be asked: "),
        (elsewhere, "it answered with status 302, and not with its metrics"),
        (no_metrics, "it answered with status 501, and not with its metrics"),
        (packed, "it answered with status 200, and not with its metrics"),
    ],
)
async def test_one_that_does_not_do_what_it_should(
    serve: Serve, connections: ServerConnections, handler: Handler, problem: str
) -> None:
    began = asyncio.get_running_loop().time()

    found = await scrapes_of(connections, {"bad": await serve(handler), "good": await serve(good)}).all()

    assert asyncio.get_running_loop().time() - began < 4
    assert (found["bad"].problem or "").startswith(problem)
    assert found["bad"].samples == ()
    assert found["good"].problem is None
    assert len(found["good"].samples) == 6


async def test_one_that_is_not_there(connections: ServerConnections, unused_ports: PortRanges) -> None:
    found = await scrapes_of(connections, {"gone": AtPort("127.0.0.1", unused_ports()[0])}).all()

    assert (found["gone"].problem or "").startswith("it cannot be asked: ")


async def test_many_are_asked_at_once_and_not_all(serve: Serve, connections: ServerConnections) -> None:
    now = most = 0

    async def counting(_: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.05)
        now -= 1
        return web.Response(body=ANSWER)

    reach = await serve(counting)
    found = await scrapes_of(connections, {f"model{number}": reach for number in range(30)}).all()

    assert most == 8
    assert all(scrape.problem is None for scrape in found.values())


async def test_when_none_of_many_answers_it_ends_all_the_same(
    serve: Serve, connections: ServerConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 1.0)
    monkeypatch.setattr(module, "_PATIENCE_WITH_ALL", 3.0)
    reach = await serve(silent)
    began = asyncio.get_running_loop().time()

    found = await scrapes_of(connections, {f"model{number}": reach for number in range(100)}).all()

    assert asyncio.get_running_loop().time() - began < 10
    assert all(scrape.problem for scrape in found.values())
    assert found["model99"].problem == "it was not asked: the servers before it took too long"


async def test_what_is_wrong_is_said_once(
    serve: Serve,
    connections: ServerConnections,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_FRESH", 0.0)
    reach = await serve(no_metrics)
    servers: dict[str, Reach] = {"bad": reach}
    scrapes = scrapes_of(connections, servers)
    for _ in range(3):
        await scrapes.all()
    assert caplog.text.count("the metrics of bad cannot be had") == 1

    servers["bad"] = await serve(good)
    await scrapes.all()
    servers["bad"] = reach
    await scrapes.all()
    assert caplog.text.count("the metrics of bad cannot be had") == 2
