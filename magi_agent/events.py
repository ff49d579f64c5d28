"""The one stream of events: every change of state that anybody may wait for.

Whoever changes something publishes one typed event; waiting API calls, metrics and event streams all subscribe here.
A subscriber that falls behind loses the oldest events and is told so, it never holds up the publisher.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from magi_agent.vocabulary import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something changed."""

    at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsChanged(Event):
    """A scan found something new, changed or gone."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesChanged(Event):
    """A person chose something for a model."""

    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerChanged(Event):
    """A model's server went from one state to another."""

    model_id: str
    before: ServerState
    after: ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTroubled(Event):
    """Something could not be done about a model's server, and is tried again."""

    model_id: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilesChanged(Event):
    """A profile was made, replaced, deleted or activated."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationReloaded(Event):
    """The configuration was read again, and was good: keys as the file has them."""

    changed: tuple[str, ...] = ()
    awaiting_restart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFinished(Event):
    """An action on several models came to its end."""

    operation_id: str


class Subscription:
    """One listener's bounded view of the stream."""

    def __init__(self, limit: int) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._limit = limit
        self._wake = asyncio.Event()
        self.lost = 0

    def deliver(self, event: Event) -> None:
        """Take in one event; the oldest gives way when there is no room."""
        if len(self._events) == self._limit:
            self.lost += 1
        self._events.append(event)
        self._wake.set()

    async def next(self) -> Event:
        """The next event, in order."""
        while not self._events:
            self._wake.clear()
            await self._wake.wait()
        return self._events.popleft()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            yield await self.next()


class EventStream:
    """Publishers on one side, subscribers on the other, all on one event loop."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    def publish(self, event: Event) -> None:
        """Hand an event to everybody who listens now."""
        for subscription in self._subscriptions:
            subscription.deliver(event)

    @contextmanager
    def subscribe(self, limit: int = 1024) -> Iterator[Subscription]:
        """Listen for as long as the context lasts; at most ``limit`` events wait."""
        subscription = Subscription(limit)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
