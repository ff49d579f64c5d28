"""Proving that a server is ready: its health says so, and it is its own unit that answers.

An answer alone proves nothing: a stranger on the port, an orphan of an earlier run for one, may give it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import aiohttp

_FIRST_PAUSE: Final = 0.01
_GROWTH: Final = 1.01
"""Of a pause over the one before: a server is found ready late by at most about 1 % of the time it took."""
_REQUEST_TIMEOUT: Final = 5.0
_STRANGER_STAYS: Final = 0.5
"""Seconds that somebody else must have answered to be there to stay."""
_HARD_CAP: Final = 10
"""However much progress a server shows, after this many times the allowed stillness it has failed."""


class Verdict(StrEnum):
    """How waiting for a server ended."""

    READY = "ready"
    STRANGER = "stranger"
    """Something else answers on its port."""
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for; seconds."""

    stillness: float
    """Without any sign of progress."""
    longest_pause: float
    """Between two checks."""


async def wait_until_ready(
    session: aiohttp.ClientSession,
    url: str,
    *,
    owns_port: Callable[[], Awaitable[bool | None]],
    progress: Callable[[], Awaitable[object]],
    patience: Patience,
) -> Verdict:
    """Ask the server at ``url`` until it is ready, or has shown no progress for too long.

    ``owns_port`` says whether the socket that listens belongs to the unit, ``None`` where the kernel does not tell.
    ``progress`` is any value that changes while the server gets on.
    """
    began = time.monotonic()
    deadline = began + patience.stillness
    cap = began + patience.stillness * _HARD_CAP
    seen: object = None
    looked_at = began
    pause = _FIRST_PAUSE
    stranger_since: float | None = None
    while True:
        if await _is_healthy(session, url):
            if await owns_port() is not False:
                return Verdict.READY
            stranger_since = stranger_since or time.monotonic()
            if time.monotonic() - stranger_since >= _STRANGER_STAYS:
                return Verdict.STRANGER
        else:
            stranger_since = None
        now = time.monotonic()
        if now - looked_at >= min(1.0, patience.stillness / 4):
            looked_at = now
            if (current := await progress()) != seen:
                seen = current
                deadline = now + patience.stillness
        if now >= min(deadline, cap):
            return Verdict.TIMEOUT
        await asyncio.sleep(min(pause, max(0.0, min(deadline, cap) - now)))
        pause = min(pause * _GROWTH, patience.longest_pause)


async def _is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT)
        async with session.get(f"{url}/health", timeout=timeout, allow_redirects=False) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
