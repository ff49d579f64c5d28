"""The least that a proxy on aiohttp is: each request passed on to one server, and its answer back.

    python -m tests.bench.bare_proxy PORT UPSTREAM_PORT

The floor of the gateway: what no code of the agent's own can save.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

_MOST = 64 << 20
_SESSION = web.AppKey("session", aiohttp.ClientSession)
_UPSTREAM = web.AppKey("upstream", str)


async def _pass_on(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    try:
        return await _passed_on(request, body)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        # llama-server has ended the connection, as it does after each stream.
        return await _passed_on(request, body)


async def _passed_on(request: web.Request, body: bytes) -> web.StreamResponse:
    headers = {"Content-Type": request.headers["Content-Type"]}
    url = f"{request.app[_UPSTREAM]}{request.raw_path}"
    async with request.app[_SESSION].request(request.method, url, data=body, headers=headers) as answer:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
        response.content_length = answer.content_length
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def _session(app: web.Application) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        app[_SESSION] = session
        yield


def main() -> None:
    """Serve until SIGTERM."""
    port, upstream = sys.argv[1:]
    app = web.Application(client_max_size=_MOST)
    app[_UPSTREAM] = f"http://127.0.0.1:{upstream}"
    app.cleanup_ctx.append(_session)
    app.router.add_route("*", "/{path:.*}", _pass_on)
    web.run_app(app, host="127.0.0.1", port=int(port), print=None, access_log=None)


if __name__ == "__main__":
    main()
