"""What becomes of requests to models that are under way when the agent stops: they are let end, for a bounded time.

New ones wait meanwhile, in systemd's sockets, for the next agent; so what is bounded is also how long they wait. Where
the host goes down, the servers end as well, and nobody is waited for longer than for any other request.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from magi_agent.api.listeners import Listeners
from magi_agent.gateway.lanes import Lanes
from magi_agent.gateway.tallies import Tallies
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.notify import Notifier

_LOG: Final = logging.getLogger(__name__)
_TURN: Final = 5.0
"""Seconds after which systemd is told again, and asked whether the host goes down."""
_EXTENSION: Final = 30.0
"""Seconds that systemd is asked for each time: the turn, and what the rest of the stop takes."""
_SYSTEMD_SECONDS: Final = 1.0
_LEAST: Final = 5.0
"""Seconds that every request has, also while the host goes down."""
_LAST_WORD: Final = 0.2
"""Seconds for those who wait for their model still when time is up to be told so."""


class LastAnswers:
    """Waits for them, once."""

    def __init__(
        self,
        listeners: Listeners,
        lanes: Lanes,
        tallies: Tallies,
        manager: SystemdManager,
        notifier: Notifier,
        seconds: Callable[[], float],
    ) -> None:
        """``seconds`` is for how long."""
        self._listeners = listeners
        self._lanes = lanes
        self._tallies = tallies
        self._manager = manager
        self._notifier = notifier
        self._seconds = seconds
        self._hurry = asyncio.Event()
        self.status: str | None = None
        """How it stands, in words, while it is waited."""

    def hurry(self) -> None:
        """Wait no longer, for anybody: what is under way is cut off."""
        self._hurry.set()
        self._cut_off()

    async def wait(self) -> None:
        """Take no new requests, and wait for the answers to those that there are. Those that are left are cut off."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(self._seconds(), _LEAST)
        # Who has just connected has a second, before anything is known of what they ask.
        self._notifier.extend_timeout(_EXTENSION)
        await self._listeners.close()
        if self._listeners.asking_models:
            _LOG.info("%s; another signal ends them at once", self._told(deadline - loop.time()))
        while self._listeners.asking_models and not self._hurry.is_set() and (left := deadline - loop.time()) > 0:
            if await self._host_goes_down():
                deadline = min(deadline, loop.time() + _LEAST)
                left = deadline - loop.time()
            self.status = self._told(left)
            self._notifier.status(self.status)
            self._notifier.extend_timeout(_EXTENSION)
            await self._listeners.answered(min(left, _TURN), unless=self._hurry)
        self.status = None
        await self._leave()
        self._notifier.extend_timeout(_EXTENSION)

    async def _leave(self) -> None:
        """Tell those that still wait for their model, and cut off who is not answered yet."""
        if not self._listeners.asking_models:
            return
        self._lanes.turn_away()
        if not self._hurry.is_set():
            await asyncio.sleep(_LAST_WORD)
        if left := self._listeners.asking_models:
            _LOG.warning("requests to models that were not answered in time and are cut off: %d", left)
            self._cut_off()

    def _cut_off(self) -> None:
        # They are told as what they are: no client left.
        self._tallies.cut_off()
        self._listeners.cut_off()

    async def _host_goes_down(self) -> bool:
        try:
            async with asyncio.timeout(_SYSTEMD_SECONDS):
                return await self._manager.is_stopping()
        except (BusError, TimeoutError):
            return False

    def _told(self, left: float) -> str:
        under_way = self._listeners.asking_models
        requests = "1 request" if under_way == 1 else f"{under_way} requests"
        return f"finishing {requests}, at most {left:.0f} s"
