"""From the agent's events to what goes over the wire, and which of them a listener asked for."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from magi_agent.api.event_schemas import (
    ChoicesChangedEvent,
    ConfigurationReloadedEvent,
    DrainChangedEvent,
    EventFailure,
    ModelsChangedEvent,
    OneEvent,
    OperationFinishedEvent,
    ProfileActivatedEvent,
    ProfilesChangedEvent,
    ServerChangedEvent,
    ServerProgressEvent,
    ServerTroubledEvent,
)
from magi_agent.api.representations import readable
from magi_agent.api.streaming import Item
from magi_agent.events import (
    ChoicesChanged,
    ConfigurationReloaded,
    DrainChanged,
    Event,
    ModelsChanged,
    Numbered,
    OperationFinished,
    ProfileActivated,
    ProfilesChanged,
    ServerChanged,
    ServerProgress,
    ServerTroubled,
)
from magi_agent.vocabulary import EventType

TYPES: Final[dict[type[Event], EventType]] = {
    ModelsChanged: EventType.MODELS_CHANGED,
    ChoicesChanged: EventType.CHOICES_CHANGED,
    ServerChanged: EventType.SERVER_CHANGED,
    ServerProgress: EventType.SERVER_PROGRESS,
    ServerTroubled: EventType.SERVER_TROUBLED,
    ProfilesChanged: EventType.PROFILES_CHANGED,
    ProfileActivated: EventType.PROFILE_ACTIVATED,
    ConfigurationReloaded: EventType.CONFIGURATION_RELOADED,
    OperationFinished: EventType.OPERATION_FINISHED,
    DrainChanged: EventType.DRAIN_CHANGED,
}
"""What each kind of event is called on the wire; others stay inside the agent."""
_MOST_IDS: Final = 500
"""Ids in one list of an event: a first scan may find ten thousand models, and what changed is in the registry."""
_KEPT: Final = 64
"""Documents that are kept: all listeners want the newest ones, at the same time."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events a listener wants."""

    types: frozenset[EventType] = frozenset()
    """Empty for all."""
    model_ids: frozenset[str] = frozenset()
    """Only those that are about one of these models; empty for all."""

    def takes(self, event: Event) -> bool:
        """Whether the listener wants this event."""
        kind = TYPES.get(type(event))
        if kind is None or (self.types and kind not in self.types):
            return False
        return not self.model_ids or not self.model_ids.isdisjoint(_models_of(event))


def _models_of(event: Event) -> Collection[str]:
    """The models that an event is about."""
    match event:
        case ChoicesChanged() | ServerChanged() | ServerProgress() | ServerTroubled():
            return (event.model_id,)
        case ModelsChanged():
            return (*event.added, *event.changed, *event.removed)
        case OperationFinished():
            return event.model_ids
        case _:
            return ()


class EventDocuments:
    """Writes each event once, however many listen."""

    def __init__(self, life: str, model_bytes: Callable[[str], int | None]) -> None:
        """``life`` names this life of the agent in ids; ``model_bytes`` says how large a model's files are."""
        self._life = life
        self._model_bytes = model_bytes
        self._written: OrderedDict[int, Item] = OrderedDict()

    def id(self, number: int) -> str:
        """The id of the event of this number, on the wire."""
        return f"{self._life}-{number}"

    def item(self, numbered: Numbered) -> Item:
        """An event as it is streamed."""
        item = self._written.get(numbered.number)
        if item is None:
            item = self._written[numbered.number] = item_of(self._answer(numbered))
            if len(self._written) > _KEPT:
                self._written.popitem(last=False)
        return item

    def _answer(self, numbered: Numbered) -> OneEvent:
        event, at, name = numbered.event, numbered.event.at, self.id(numbered.number)
        match event:
            case ModelsChanged(added=added, changed=changed, removed=removed):
                unlisted = sum(max(0, len(ids) - _MOST_IDS) for ids in (added, changed, removed))
                lists = [list(ids[:_MOST_IDS]) for ids in (added, changed, removed)]
                return ModelsChangedEvent(
                    id=name, at=at, added=lists[0], changed=lists[1], removed=lists[2], unlisted=unlisted
                )
            case ChoicesChanged(model_id=model_id):
                return ChoicesChangedEvent(id=name, at=at, model_id=model_id)
            case ServerChanged(model_id=model_id, before=before, after=after):
                failure = _failure(event.result, event.message)
                return ServerChangedEvent(
                    id=name,
                    at=at,
                    model_id=model_id,
                    before=before,
                    after=after,
                    failure=failure,
                    forced=event.is_forced,
                )
            case ServerProgress(model_id=model_id):
                return ServerProgressEvent(
                    id=name,
                    at=at,
                    model_id=model_id,
                    elapsed_seconds=event.elapsed_seconds,
                    cpu_seconds=event.cpu_seconds,
                    memory_bytes=event.memory_bytes,
                    read_bytes=event.read_bytes,
                    model_bytes=self._model_bytes(model_id),
                )
            case ServerTroubled(model_id=model_id, message=message):
                return ServerTroubledEvent(id=name, at=at, model_id=model_id, message=readable(message))
            case ProfilesChanged():
                return ProfilesChangedEvent(id=name, at=at, name=event.name)
            case ProfileActivated(by=by):
                return ProfileActivatedEvent(id=name, at=at, name=event.name, by=readable(by))
            case ConfigurationReloaded(changed=changed, awaiting_restart=awaiting):
                return ConfigurationReloadedEvent(
                    id=name, at=at, changed=list(changed), awaiting_restart=list(awaiting)
                )
            case OperationFinished(operation_id=operation_id, kind=kind, succeeded=succeeded):
                return OperationFinishedEvent(id=name, at=at, operation_id=operation_id, kind=kind, succeeded=succeeded)
            case DrainChanged(draining=draining, by=by):
                return DrainChangedEvent(id=name, at=at, draining=draining, by=readable(by))
            case _:
                raise TypeError(f"{type(event).__name__} has no form on the wire")


def _failure(result: str | None, message: str | None) -> EventFailure | None:
    if result is None or message is None:
        return None
    return EventFailure(result=result, message=readable(message))


def item_of(event: OneEvent) -> Item:
    """One event on the wire as it is streamed."""
    return Item(event.model_dump_json(by_alias=True).encode(), event.type, event.id)
