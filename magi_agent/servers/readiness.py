"""Proving that a server is ready: its health says so, and it is its own unit that answers.

An answer alone proves nothing: a stranger on the port, an orphan of an earlier run for one, may give it. So nobody is
shown a server's key before that is settled; llama-server tells its health without.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import Final

from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.http_exchange import ExchangeError, NotConnected
from magi_agent.servers.reach import Reach

_FIRST_PAUSE: Final = 0.01
_GROWTH: Final = 1.01
"""Of a pause over the one before: a server is found ready late by at most about 1 % of the time it took."""
_REQUEST_TIMEOUT: Final = 5.0
_STAYS: Final = 0.5
"""Seconds that somebody else must have answered, or the door been closed to us, for it to be there to stay."""
_HARD_CAP: Final = 10
"""However much progress a server shows, after this many times the allowed stillness it has failed."""


class Verdict(StrEnum):
    """How waiting for a server ended."""

    READY = "ready"
    STRANGER = "stranger"
    """Something else answers in its place."""
    FORBIDDEN = "forbidden"
    """The agent may not connect to it."""
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for; seconds."""

    stillness: float
    """Without any sign of progress."""
    longest_pause: float
    """Between two checks."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """What a server has used so far; as long as that changes, it gets on. ``None`` is what nobody can tell."""

    cpu_seconds: float | None = None
    read_bytes: int | None = None
    """From the disk."""
    memory_bytes: int | None = field(default=None, compare=False)
    """The kernel takes some of it back, and gives it again, without anybody's doing."""


class _Health(Enum):
    GOOD = auto()
    NOT_YET = auto()
    FORBIDDEN = auto()


async def wait_until_ready(
    connections: ServerConnections,
    reach: Reach,
    *,
    is_its_own: Callable[[], Awaitable[bool | None]],
    progress: Callable[[], Awaitable[object]],
    patience: Patience,
) -> Verdict:
    """Ask the server at ``reach`` until it is ready, or has shown no progress for too long.

    ``is_its_own`` says whether the socket that listens there belongs to the unit, ``None`` where the kernel does not
    tell. ``progress`` is any value that changes while the server gets on.
    """
    began = time.monotonic()
    deadline = began + patience.stillness
    cap = began + patience.stillness * _HARD_CAP
    seen: object = None
    looked_at = began
    pause = _FIRST_PAUSE
    trouble: Verdict | None = None
    trouble_since = began
    while True:
        health = await _health(connections, reach)
        found: Verdict | None = None
        if health is _Health.GOOD:
            if await is_its_own() is not False:
                return Verdict.READY
            found = Verdict.STRANGER
        elif health is _Health.FORBIDDEN:
            found = Verdict.FORBIDDEN
        now = time.monotonic()
        if found is not trouble:
            trouble, trouble_since = found, now
        elif found is not None and now - trouble_since >= _STAYS:
            return found
        if now - looked_at >= min(1.0, patience.stillness / 4):
            looked_at = now
            if (current := await progress()) != seen:
                seen = current
                deadline = now + patience.stillness
        if now >= min(deadline, cap):
            return Verdict.TIMEOUT
        await asyncio.sleep(min(pause, max(0.0, min(deadline, cap) - now)))
        pause = min(pause * _GROWTH, patience.longest_pause)


async def _health(connections: ServerConnections, reach: Reach) -> _Health:
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            with await connections.ask(reach, "GET", "/health", silence=_REQUEST_TIMEOUT, with_key=False) as answer:
                return _Health.GOOD if answer.status == 200 else _Health.NOT_YET
    except NotConnected as error:
        return _Health.FORBIDDEN if error.is_forbidden else _Health.NOT_YET
    except (ExchangeError, TimeoutError):
        return _Health.NOT_YET
