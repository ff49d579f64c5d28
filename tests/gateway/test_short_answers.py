"""Servers that break off in the midst of an answer whose length they have told."""

from __future__ import annotations

import contextlib
from pathlib import Path

import aiohttp
import locations

from tests.api.conftest import Serve
from tests.gateway.test_gateway import ONE, PROMPT, started
from tests.servers.system import script

SAID = b"data: one\n\ndata: tw"
TOO_SHORT = f"""\
import http.server, sys

class TooShort(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", "500")
        self.end_headers()
        self.wfile.write({SAID!r})

host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
http.server.ThreadingHTTPServer((host, int(port)), TooShort).serve_forever()
"""
"""What no llama-server does: none tells the length of a stream."""


async def test_what_is_missing_is_not_filled_with_an_error(serve: Serve, tmp_path: Path) -> None:
    short = script(tmp_path / "short", TOO_SHORT, interpreter=str(locations.PYTHON))
    api = await serve(ONE, llama_server_path=str(short))
    await started(api)
    async with api.session.post(f"{api.base}/v1/completions", json={"model": ONE, **PROMPT}) as answer:
        assert answer.headers["Content-Length"] == "500"
        said, is_whole = bytearray(), False
        with contextlib.suppress(aiohttp.ClientPayloadError):
            async for piece in answer.content.iter_any():
                said += piece
            is_whole = True

    assert (bytes(said), is_whole) == (SAID, False)
