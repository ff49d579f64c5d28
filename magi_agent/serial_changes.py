"""Changes to what is kept on disk: one after another, and each to its end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


class SerialChanges:
    """Makes changes in the order they were asked for.

    Each runs in a task of its own, so a caller that goes away (a client that hung up, a time limit) does not break one
    off half-way, which would leave what is on disk and what is in memory apart.
    """

    def __init__(self, name: str) -> None:
        """``name`` is what the tasks are called."""
        self._name = name
        self._turn = asyncio.Lock()
        self._under_way: set[asyncio.Task[object]] = set()

    async def make(self, change: Callable[[], Awaitable[_T]]) -> _T:
        """Make one change when its turn comes; what it returns or raises."""
        task = asyncio.create_task(self._in_turn(change), name=self._name)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def settled(self) -> None:
        """Wait until every change that was asked for has ended."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _in_turn(self, change: Callable[[], Awaitable[_T]]) -> _T:
        async with self._turn:
            return await change()
