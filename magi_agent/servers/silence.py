"""How long servers may say nothing: one timer for all that wait for one.

Nearly every wait ends long before its time, so that a timer of its own would be made and cancelled with each request.
"""

import asyncio
import math
from time import monotonic
from typing import Protocol


class Waiting(Protocol):
    """What may wait for a server."""

    silence: float
    """Seconds for which the server may say nothing."""
    waits_since: float
    """When it began to wait (``time.monotonic``); infinite where it does not wait now."""

    def tell_silence(self) -> None:
        """It has waited long enough."""


class SilenceWatch:
    """Tells those that wait when they have waited long enough. Used within one loop."""

    def __init__(self) -> None:
        self._waiting: set[Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, waiting: Waiting) -> None:
        """Look at one from now on, whether it waits at that moment or not."""
        self._waiting.add(waiting)
        ends_at = monotonic() + waiting.silence
        if self._timer is None or ends_at < self._timer.when():
            self._look_at(ends_at)

    def end(self, waiting: Waiting) -> None:
        """Look at it no more."""
        self._waiting.discard(waiting)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # The loop's clock is time.monotonic.
        self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        now, nearest = monotonic(), math.inf
        for waiting in tuple(self._waiting):
            ends_at = min(now, waiting.waits_since) + waiting.silence
            if ends_at <= now:
                waiting.tell_silence()
                # It may have heard something in this very moment, and wait on.
                ends_at = now + waiting.silence
            nearest = min(nearest, ends_at)
        if nearest < math.inf:
            self._look_at(nearest)
