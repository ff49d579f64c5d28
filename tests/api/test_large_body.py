"""Large answers: whole for who reads them, and no load on the agent for who does not."""

import asyncio
import socket

import pytest
from aiohttp import ClientSession, UnixConnector, web

from magi_agent.api.exchange import answer
from magi_agent.api.large_body import SLICE

CONTENT = bytes(number % 251 for number in range(10 * SLICE + 7))


async def until(condition):
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.fixture
async def serving(tmp_path):
    """An application that gives a large answer, and the transports of its callers."""
    transports = []

    async def large(request):
        transports.append(request.transport)
        return answer(CONTENT)

    app = web.Application()
    app.router.add_get("/", large)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "socket")).start()
    yield str(tmp_path / "socket"), transports
    await runner.cleanup()


async def test_a_large_answer_comes_whole_as_json_with_its_length(serving):
    path, _ = serving
    async with ClientSession(connector=UnixConnector(path)) as session:
        for _ in range(2):
            async with session.get("http://magi/") as response:
                assert await response.read() == CONTENT
                assert response.headers["Content-Type"] == "application/json; charset=utf-8"
                assert response.headers["Content-Length"] == str(len(CONTENT))
        async with session.head("http://magi/") as response:
            assert response.headers["Content-Length"] == str(len(CONTENT))
            assert await response.read() == b""


async def test_for_a_caller_who_does_not_read_no_more_than_a_slice_is_kept(serving):
    path, transports = serving
    with socket.socket(socket.AF_UNIX) as caller:
        caller.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(caller, path)
        await loop.sock_sendall(caller, b"GET / HTTP/1.1\r\nHost: magi\r\n\r\n")
        await until(lambda: transports and transports[0].get_write_buffer_size())
        assert transports[0].get_write_buffer_size() <= SLICE
        read = b""
        async with asyncio.timeout(10):
            while not read.endswith(CONTENT):
                read += await loop.sock_recv(caller, 1 << 20)


async def test_a_caller_who_leaves_in_between_harms_nobody(serving):
    path, transports = serving
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET / HTTP/1.1\r\nHost: magi\r\n\r\n")
    await reader.readexactly(1000)
    writer.transport.abort()
    await until(transports[0].is_closing)
    async with ClientSession(connector=UnixConnector(path)) as session, session.get("http://magi/") as response:
        assert await response.read() == CONTENT
