"""Changes one after another, each to its end, whoever goes away meanwhile."""

import asyncio
from functools import partial

import pytest

from magi_agent.serial_changes import SerialChanges


async def test_changes_are_made_in_order_and_never_two_at_once():
    changes = SerialChanges("test")
    made: list[int] = []
    under_way = 0

    async def change(number: int) -> int:
        nonlocal under_way
        under_way += 1
        assert under_way == 1
        await asyncio.sleep(0)
        made.append(number)
        under_way -= 1
        return number

    answers = await asyncio.gather(*(changes.make(partial(change, number)) for number in range(20)))
    assert answers == made == list(range(20))


async def test_a_change_whose_caller_goes_away_is_made_to_its_end_before_the_next():
    changes = SerialChanges("test")
    begun, goes_on = asyncio.Event(), asyncio.Event()
    made = []

    async def slow() -> None:
        begun.set()
        await goes_on.wait()
        made.append("slow")

    async def next_one() -> None:
        made.append("next")

    impatient = asyncio.create_task(changes.make(slow))
    patient = asyncio.create_task(changes.make(next_one))
    async with asyncio.timeout(10):
        await begun.wait()
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    assert made == []
    goes_on.set()
    async with asyncio.timeout(10):
        await patient
    assert made == ["slow", "next"]
    assert not changes._under_way


async def test_a_change_that_fails_says_so_to_its_caller_alone():
    changes = SerialChanges("test")

    async def fails() -> None:
        raise ValueError("no")

    async def works() -> str:
        return "yes"

    with pytest.raises(ValueError, match="no"):
        await changes.make(fails)
    assert await changes.make(works) == "yes"
