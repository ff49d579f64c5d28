"""The stream of events: everybody hears everything in order, and who falls behind is told so."""

import asyncio
from datetime import UTC

import pytest

from magi_agent.events import ChoicesChanged, Event, EventStream, ModelsChanged, ServerChanged, Subscription
from magi_agent.vocabulary import ServerState


def choices(number: int) -> ChoicesChanged:
    return ChoicesChanged(model_id=f"m{number}")


async def take(subscription: Subscription, count: int) -> list[Event]:
    async with asyncio.timeout(10):
        return [await subscription.next() for _ in range(count)]


async def test_every_subscriber_hears_every_event_in_order():
    stream = EventStream()
    events = [choices(1), ModelsChanged(added=("a",)), choices(2)]
    with stream.subscribe() as one, stream.subscribe() as other:
        for event in events:
            stream.publish(event)
        assert await take(one, 3) == events
        assert await take(other, 3) == events
    assert events[0].at.tzinfo is UTC


async def test_only_what_is_published_while_listening_is_heard():
    stream = EventStream()
    stream.publish(choices(1))
    with stream.subscribe() as subscription:
        second = choices(2)
        stream.publish(second)
        assert await take(subscription, 1) == [second]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await subscription.next()


async def test_a_listener_that_waits_is_woken():
    stream = EventStream()
    with stream.subscribe() as subscription:
        waiting = asyncio.create_task(subscription.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        event = ServerChanged(model_id="m", before=ServerState.STOPPED, after=ServerState.STARTING)
        stream.publish(event)
        async with asyncio.timeout(10):
            assert await waiting == event


async def test_the_oldest_give_way_and_are_counted():
    stream = EventStream(kept=3)
    events = [choices(number) for number in range(10)]
    with stream.subscribe() as slow, stream.subscribe() as quick:
        for event in events:
            stream.publish(event)
            assert await take(quick, 1) == [event]
        assert await take(slow, 3) == events[-3:]
        assert (slow.lost, quick.lost) == (7, 0)
        stream.publish(choices(10))
        assert (await slow.next_numbered()).number == 11
        assert slow.lost == 7


async def test_who_comes_back_hears_what_came_meanwhile():
    stream = EventStream(kept=3)
    for number in range(1, 6):
        stream.publish(choices(number))
    assert (stream.first, stream.last) == (3, 5)
    for after, numbers, lost in ((2, [3, 4, 5], 0), (4, [5], 0), (0, [3, 4, 5], 2)):
        with stream.subscribe(after) as subscription:
            assert subscription.waiting == 5 - after
            assert [(await subscription.next_numbered()).number for _ in numbers] == numbers
            assert subscription.lost == lost
            assert not subscription.waiting


async def test_who_names_a_number_that_is_still_to_come_hears_it():
    stream = EventStream()
    with stream.subscribe(after=7) as subscription:
        stream.publish(choices(1))
        assert (await subscription.next_numbered()).number == 1


async def test_two_streams_are_told_from_each_other():
    assert EventStream().life != EventStream().life


async def test_a_subscription_can_be_iterated():
    stream = EventStream()
    heard = []
    with stream.subscribe() as subscription:
        for number in range(3):
            stream.publish(choices(number))
        async with asyncio.timeout(10):
            async for event in subscription:
                heard.append(event)
                if len(heard) == 3:
                    break
    assert [event.model_id for event in heard if isinstance(event, ChoicesChanged)] == ["m0", "m1", "m2"]


async def test_a_listener_that_is_cancelled_loses_nothing_and_leaves_nothing():
    stream = EventStream()
    with stream.subscribe() as subscription:
        waiting = asyncio.create_task(subscription.next())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        event = choices(1)
        stream.publish(event)
        assert await take(subscription, 1) == [event]
    assert not stream._subscriptions
