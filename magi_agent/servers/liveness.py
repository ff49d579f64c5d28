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

from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.http_exchange import ExchangeError
from magi_agent.servers.reach import Reach


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often is looked, and how long is waited; seconds."""

    interval: float = 60.0
    """Between two looks at a server that answers."""
    moments: int = 6
    """In an interval, at which servers are looked at."""
    answer: float = 10.0
    """For an answer."""
    again: float = 10.0
    """Before the next look at one that did not answer."""
    misses: int = 3
    """Looks in a row without an answer, and without any work done from the first of them on, of one that hangs."""


RHYTHM: Final = Rhythm()


async def wait_until_hung(
    connections: ServerConnections, reach: Reach, progress: Callable[[], Awaitable[object]], rhythm: Rhythm = RHYTHM
) -> float:
    """Look at a server again and again, and return when it hangs: for how many seconds, at least.

    ``progress`` is any value that changes while the server works.
    """
    loop = asyncio.get_running_loop()
    # Those that became ready together need not all be asked together for ever.
    await _moment_before(random.uniform(0, rhythm.interval), rhythm)  # noqa: S311  # no secret
    misses = 0
    since = loop.time()
    before: object = None
    while True:
        if await _answers(connections, reach, rhythm.answer):
            misses = 0
            await _moment_before(rhythm.interval, rhythm)
            continue
        # Only now: of one that answers, this would cost more than the question.
        now = await progress()
        misses = misses + 1 if misses and now == before else 1
        before = now
        if misses == 1:
            since = loop.time() - rhythm.answer
        if misses >= rhythm.misses:
            return loop.time() - since
        await asyncio.sleep(rhythm.again)


async def _moment_before(seconds: float, rhythm: Rhythm) -> None:
    """Sleep for so long, or a bit less: until one of the moments that the looks at all servers share.

    To wake up a processor that rests, and the server, costs several times what a look at one more does.
    """
    now = asyncio.get_running_loop().time()
    apart = rhythm.interval / rhythm.moments
    await asyncio.sleep(max(0.0, (now + seconds) // apart * apart - now))


async def _answers(connections: ServerConnections, reach: Reach, seconds: float) -> bool:
    """Whether a server says anything at all in that time."""
    try:
        async with asyncio.timeout(seconds):
            with await connections.ask(reach, "GET", "/health", silence=seconds, with_key=False):
                return True
    except (ExchangeError, TimeoutError):
        return False
