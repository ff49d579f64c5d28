"""The first moments of an agent, in which it does not know yet that the servers answer that it finds running.

Who waited in the sockets for it is there at once, and would be told that no model is ready.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from magi_agent.events import EventStream
from magi_agent.servers.servers import Servers
from magi_agent.vocabulary import ServerState

_LONGEST: Final = 20.0
"""Seconds that a request waits, whatever the agent is held up by."""
_FIRST_ANSWERS: Final = 3.0
"""Seconds that a server which runs has to answer; it may be loading its model, and nobody waits for that here."""
_NOT_KNOWN: Final = frozenset({ServerState.STARTING, ServerState.LOADING})


class Opening:
    """Holds requests back until it is known which servers answer."""

    def __init__(self, servers: Servers, events: EventStream) -> None:
        self._servers = servers
        self._events = events
        self._open = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether nobody is held back."""
        return self._open.is_set()

    async def wait(self) -> None:
        """Return once it is open, or has not been for too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST):
                await self._open.wait()

    async def open(self, running: Collection[str]) -> None:
        """Open it once each of the servers that run has answered, or has not for some seconds."""
        with self._events.subscribe() as changes, suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ANSWERS):
                while any(self._servers.state(model_id) in _NOT_KNOWN for model_id in running):
                    await changes.next()
        self._open.set()
