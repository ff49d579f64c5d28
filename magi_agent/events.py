"""The one stream of events: every change of state that anybody may wait for.

Whoever changes something publishes one typed event; waiting API calls, metrics and event streams all subscribe here.
Events are numbered, and the last of them are kept: a listener is a place in what is kept. One that falls behind loses
the oldest events and is told so, it never holds up the publisher, and costs no memory of its own.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from magi_agent.vocabulary import ServerState

_KEPT: Final = 1024


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
    result: str | None = None
    """Where it failed, in one word: why."""
    message: str | None = None
    """The same in one sentence."""
    is_forced: bool = False
    """Whether it is being started by somebody's word that it be so also where it does not fit into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProgress(Event):
    """A server that is not ready yet gets on, as far as can be seen; ``None`` is what cannot be."""

    model_id: str
    elapsed_seconds: float
    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    """Of its control group, what is read of the model's file included."""
    read_bytes: int | None = None
    """From the disk; what the kernel has in memory already is not read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTroubled(Event):
    """Something could not be done about a model's server, and is tried again."""

    model_id: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilesChanged(Event):
    """A profile was made, replaced or deleted."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileActivated(Event):
    """A profile is the active one from now on."""

    name: str
    by: str
    """Who said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainChanged(Event):
    """Nothing is started any more, or that was taken back."""

    draining: bool
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationReloaded(Event):
    """The configuration was read again, and was good: keys as the file has them."""

    changed: tuple[str, ...] = ()
    awaiting_restart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFinished(Event):
    """An action on several models came to its end."""

    operation_id: str
    kind: str = ""
    succeeded: bool = True
    model_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event and its place in the stream: each number is one more than the one before."""

    number: int
    event: Event


class Subscription:
    """One listener's place in the stream."""

    def __init__(self, stream: "EventStream", heard: int) -> None:
        self._stream = stream
        self._heard = heard
        self._wake = asyncio.Event()
        self.lost = 0
        """Events that were not kept long enough for this listener."""

    @property
    def waiting(self) -> int:
        """Events that are there and were not heard yet."""
        return self._stream.last - self._heard

    def wake(self) -> None:
        """There is news."""
        self._wake.set()

    def skip(self) -> None:
        """Pass over all that was published so far."""
        self._heard = self._stream.last

    async def next(self) -> Event:
        """The next event, in order."""
        return (await self.next_numbered()).event

    async def next_numbered(self) -> Numbered:
        """The next event, in order, with its number; ``lost`` has grown where some between are gone."""
        while not self.waiting:
            self._wake.clear()
            await self._wake.wait()
        if self._heard + 1 < self._stream.first:
            self.lost += self._stream.first - 1 - self._heard
            self._heard = self._stream.first - 1
        self._heard += 1
        return self._stream.kept(self._heard)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            yield await self.next()


class EventStream:
    """Publishers on one side, subscribers on the other, all on one event loop."""

    def __init__(self, kept: int = _KEPT) -> None:
        """``kept`` is the number of events that are kept."""
        self._kept: deque[Numbered] = deque(maxlen=kept)
        self._subscriptions: set[Subscription] = set()
        self.life = secrets.token_hex(4)
        """Tells this stream's numbers from those of another life of the agent."""
        self.last = 0
        """The number of the event that was published last."""

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept; that of the next one where there is none."""
        return self.last + 1 - len(self._kept)

    def kept(self, number: int) -> Numbered:
        """The event of a number from ``first`` to ``last``."""
        return self._kept[number - self.first]

    def publish(self, event: Event) -> None:
        """Number an event, keep it, and wake everybody who listens."""
        self.last += 1
        self._kept.append(Numbered(self.last, event))
        for subscription in self._subscriptions:
            subscription.wake()

    @contextmanager
    def subscribe(self, after: int | None = None) -> Iterator[Subscription]:
        """Listen for as long as the context lasts, to what comes from now on, or after the event of this number."""
        subscription = Subscription(self, self.last if after is None else min(after, self.last))
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
