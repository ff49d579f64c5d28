"""Clients that read slowly, or do not know of chunks: what they get is whole, and the agent holds little of it."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import locations
import pytest

from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.bench.asking import unchunked
from tests.conftest import MakeToyModel
from tests.gateway.test_gateway import ONE, started
from tests.servers.system import script

TOKENS = 2500
EACH = {"content": "a", "prompt": "a", "n_predict": TOKENS, "n_probs": 60, "ignore_eos": True, "stream": True}
"""With as much beside each token, it is more than the kernel takes of what a client does not read."""
MOST_HELD = 256 << 10
"""Bytes that the agent may hold of one answer."""


async def is_busy(url: str) -> bool:
    """Whether a server has an answer to make."""
    async with aiohttp.ClientSession() as direct, direct.get(f"{url}/slots") as slots:
        return any(slot["is_processing"] for slot in await slots.json())


def held(api: Api) -> int:
    """Bytes that wait in the agent for its clients."""
    transports = [connection.transport for connection in api.agent._listeners._connections()]
    return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)


async def holds_something(api: Api) -> bool:
    return held(api) > 0


UNEVEN = """\
import http.server, sys, time

PIECES = [b"data: x\\n\\n", b"data: " + b"x" * 50_000 + b"\\n\\n"] * 400

class Uneven(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in PIECES:
            self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(piece), piece))
            self.wfile.flush()
            time.sleep(0.001)
        self.wfile.write(b"0\\r\\n\\r\\n")

host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
http.server.ThreadingHTTPServer((host, int(port)), Uneven).serve_forever()
"""
"""What no llama-server says: pieces of which every other one is large."""


@pytest.fixture
async def asked_and_server(serve: Serve, models: Path, toy_model: MakeToyModel) -> tuple[Api, str]:
    toy_model(models / f"{ONE}.gguf", context_length=4096)
    api = await serve()
    return api, await started(api)


async def ask(api: Api, version: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for the stream over a connection that takes little before it is read."""
    at = urlsplit(api.base)
    client = socket.socket(socket.AF_INET if at.port else socket.AF_UNIX)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (at.hostname, at.port) if at.port else str(api.agent.settings.socket))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    content = json.dumps({"model": ONE, **EACH}).encode()
    head = f"POST /completion {version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return reader, writer


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
async def test_who_does_not_read_fills_no_memory_and_loses_nothing(
    asked_and_server: tuple[Api, str], version: str
) -> None:
    api, server = asked_and_server
    reader, writer = await ask(api, version)
    try:
        await until(partial(holds_something, api), "the client reads less than the server says")
        most = held(api)
        async with asyncio.timeout(60):
            while await is_busy(server):
                most = max(most, held(api))
                await asyncio.sleep(0.01)
        assert 0 < most < MOST_HELD
        answer = bytearray()
        while not answer.endswith(b"0\r\n\r\n") and (piece := await asyncio.wait_for(reader.read(1 << 20), 30)):
            answer += piece
    finally:
        writer.close()

    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    assert (b"chunked" in head) is (version == "HTTP/1.1")
    events = unchunked(body) if version == "HTTP/1.1" else body
    said = [json.loads(event.removeprefix(b"data: ")) for event in events.split(b"\n\n") if event]
    assert len(said) >= TOKENS
    assert said[-1]["tokens_predicted"] == TOKENS


async def test_pieces_of_unlike_sizes_fill_no_memory_either(serve: Serve, tmp_path: Path) -> None:
    uneven = script(tmp_path / "uneven", UNEVEN, interpreter=str(locations.PYTHON))
    api = await serve(ONE, llama_server_path=str(uneven))
    await started(api)
    _, writer = await ask(api, "HTTP/1.1")
    try:
        await until(partial(holds_something, api), "the client reads less than the server says")
        most = 0
        for _ in range(100):
            await asyncio.sleep(0.02)
            most = max(most, held(api))
    finally:
        writer.close()

    assert most < MOST_HELD
