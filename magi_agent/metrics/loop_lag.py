"""How late the event loop comes to what is due: the time that something of the agent's kept it from turning."""

import asyncio
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

_PAUSE: Final = 2.0
"""Seconds between two looks."""
BOUNDS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0)
"""Seconds: the upper bounds of the buckets, but for the last one, which has none."""


@dataclass(frozen=True, slots=True)
class LagCounts:
    """A histogram."""

    buckets: tuple[int, ...]
    """How many looks were so late, by bucket."""
    total: float
    """Seconds, of all looks together."""


class LoopLag:
    """Looks at the clock again and again."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def taken(self) -> LagCounts:
        """What was seen up to now."""
        return LagCounts(tuple(self._buckets), self._total)

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _PAUSE
            await asyncio.sleep(_PAUSE)
            self.note(max(0.0, loop.time() - due))

    def note(self, late: float) -> None:
        """Count a look that was so many seconds late."""
        self._buckets[bisect_left(BOUNDS, late)] += 1
        self._total += late
