"""Servers of aiohttp's that play those which a real llama-server is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from magi_agent.servers.reach import AtPort

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[AtPort]]
"""Starts a server that answers whatever is asked of it by one handler."""


@asynccontextmanager
async def playing() -> AsyncIterator[Serve]:
    """Start servers, and end them all at the end."""
    runners: list[web.AppRunner] = []

    async def make(handler: Handler) -> AtPort:
        application = web.Application()
        application.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return AtPort("127.0.0.1", runner.addresses[0][1])

    try:
        yield make
    finally:
        await asyncio.gather(*(runner.cleanup() for runner in runners))
