"""How late the event loop comes to what is due: the time that something of the agent's kept it from turning.

That is looked at while somebody reads the metrics. For nobody, an idle agent would be woken again and again.
"""

import asyncio
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

_PAUSE: Final = 2.0
"""Seconds between two looks."""
_READ_FOR: Final = 600.0
"""Seconds for which it is looked at after somebody read it: longer than anybody's pause between two scrapes."""
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
    """Looks at the clock again and again; for use in one event loop."""

    def __init__(self) -> None:
        self._read = asyncio.Event()
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def taken(self) -> LagCounts:
        """What was seen up to now. Looks go on, or begin, for whoever asks again."""
        self._read.set()
        return LagCounts(tuple(self._buckets), self._total)

    async def run(self) -> None:
        """Look until cancelled, where somebody has read it lately."""
        loop = asyncio.get_running_loop()
        while True:
            await self._read.wait()
            self._read.clear()
            until = loop.time() + _READ_FOR
            while loop.time() < until and not self._read.is_set():
                due = loop.time() + _PAUSE
                await asyncio.sleep(_PAUSE)
                self.note(max(0.0, loop.time() - due))

    def note(self, late: float) -> None:
        """Count a look that was so many seconds late."""
        self._buckets[bisect_left(BOUNDS, late)] += 1
        self._total += late
