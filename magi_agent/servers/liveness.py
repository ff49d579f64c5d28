"""Noticing that a server which was ready does nothing any more.

llama-server answers ``/health`` from its HTTP threads, also while it generates, so one that does not answer is either
held up or gone. Long work must never be taken for that: a server whose unit uses the processor gets on, whatever it
answers. One that somebody has stopped (SIGSTOP, a debugger) looks as one that hangs does.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import Reach


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often is looked, and how long is waited; seconds."""

    interval: float = 60.0
    """Between two looks at a server that answers: with twenty of them, a look costs the agent 0.05 % of a processor."""
    answer: float = 10.0
    """For an answer."""
    again: float = 10.0
    """Before the next look at one that did not answer."""
    misses: int = 3
    """Looks in a row without an answer and without any work done that make up one that hangs."""


RHYTHM: Final = Rhythm()


async def wait_until_hung(
    connections: ServerConnections, reach: Reach, progress: Callable[[], Awaitable[object]], rhythm: Rhythm = RHYTHM
) -> float:
    """Look at a server again and again, and return when it hangs: for how many seconds, at least.

    ``progress`` is any value that changes while the server works.
    """
    loop = asyncio.get_running_loop()
    # Those that became ready together need not be asked together for ever.
    await asyncio.sleep(random.uniform(0, rhythm.interval))  # noqa: S311  # no secret
    misses = 0
    since = loop.time()
    while True:
        seen = await progress()
        if await _answers(connections, reach, rhythm.answer):
            misses = 0
            await asyncio.sleep(rhythm.interval)
            continue
        misses = misses + 1 if await progress() == seen else 0
        if misses == 1:
            since = loop.time() - rhythm.answer
        if misses >= rhythm.misses:
            return loop.time() - since
        await asyncio.sleep(rhythm.again)


async def _answers(connections: ServerConnections, reach: Reach, seconds: float) -> bool:
    """Whether a server says anything at all in that time."""
    try:
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with connections.request(reach, "GET", "/health", timeout=timeout, with_key=False):
            return True
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
