"""One timer for all that wait for a server."""

from __future__ import annotations

import asyncio
import math
from time import monotonic

import pytest

from magi_agent.servers.silence import SilenceWatch

SHORT = 0.3


class Waiter:
    def __init__(self, silence: float) -> None:
        self.silence = silence
        self.waits_since = monotonic()
        self.is_told = asyncio.Event()

    def tell_silence(self) -> None:
        self.waits_since = math.inf
        self.is_told.set()


async def told(waiter: Waiter) -> float:
    """Seconds from the beginning of its wait."""
    began = waiter.waits_since
    await asyncio.wait_for(waiter.is_told.wait(), 5)
    return monotonic() - began


async def test_the_one_that_waits_shortest_is_told_first() -> None:
    watch, long, short = SilenceWatch(), Waiter(3 * SHORT), Waiter(SHORT)
    watch.begin(long)
    watch.begin(short)

    assert SHORT <= await told(short) < 2.5 * SHORT
    assert not long.is_told.is_set()
    assert 3 * SHORT <= await told(long) < 6 * SHORT


async def test_what_was_said_meanwhile_counts() -> None:
    watch, waiter = SilenceWatch(), Waiter(SHORT)
    watch.begin(waiter)
    for _ in range(5):
        await asyncio.sleep(SHORT / 2)
        waiter.waits_since = monotonic()

    assert not waiter.is_told.is_set()
    assert SHORT <= await told(waiter) < 3 * SHORT


async def test_one_that_does_not_wait_is_not_told_and_is_when_it_does() -> None:
    watch, waiter = SilenceWatch(), Waiter(SHORT)
    waiter.waits_since = math.inf
    watch.begin(waiter)
    await asyncio.sleep(3 * SHORT)
    assert not waiter.is_told.is_set()

    waiter.waits_since = monotonic()
    assert SHORT <= await told(waiter) < 3.5 * SHORT


async def test_one_that_heard_something_as_it_was_to_be_told_is_told_later() -> None:
    """Its server was silent for long enough, and said something before that was looked at."""
    watch, waiter = SilenceWatch(), Waiter(SHORT)
    tell, waiter.tell_silence = waiter.tell_silence, lambda: None  # type: ignore[method-assign]
    watch.begin(waiter)
    await asyncio.sleep(1.5 * SHORT)
    waiter.tell_silence = tell  # type: ignore[method-assign]
    waiter.waits_since = monotonic()

    assert await told(waiter) >= SHORT


async def test_one_timer_serves_all_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    loop = asyncio.get_running_loop()
    call_at = loop.call_at

    def counted(when: float, *called: object) -> asyncio.TimerHandle:
        made.append(when)
        return call_at(when, *called)  # type: ignore[arg-type]

    watch, waiters = SilenceWatch(), [Waiter(SHORT) for _ in range(100)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_at", counted)
        for waiter in waiters:
            watch.begin(waiter)
            watch.end(waiter)
    assert len(made) == 1
    await asyncio.sleep(2 * SHORT)

    assert watch._timer is None
    assert not any(waiter.is_told.is_set() for waiter in waiters)
