"""The stream of events: what changes, as it changes, for as long as somebody listens."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from magi_agent.api.event_documents import EventDocuments, Selection, item_of
from magi_agent.api.event_schemas import EventAnswer, GapEvent, GapReason
from magi_agent.api.routes import Access, QueryParameter, Route
from magi_agent.api.services import Services
from magi_agent.api.streaming import Item, StreamForm, form_of, stream
from magi_agent.errors import ServiceUnavailable, TooManyStreams, ValidationFailed
from magi_agent.events import ServerProgress
from magi_agent.vocabulary import EventType

_ID: Final = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})")
_MOST_MODELS: Final = 100
"""Models that one listener may name."""
_PASSED_OVER: Final = 256
"""Events that a listener did not ask for, after which it is told where it stands all the same."""
_GAPS: Final[dict[GapReason, str]] = {
    "agentRestarted": "the agent was started anew since that event",
    "tooOld": "what came right after that event is not kept any more",
    "unknownId": "no event has this id",
    "tooSlow": "more happened than was read in time",
}
_TYPES: Final = QueryParameter(
    "types", "string", f"only events of these kinds, comma-separated: {', '.join(EventType)}"
)
_MODEL_ID: Final = QueryParameter("modelId", "string", "only events that are about this model; may be given repeatedly")
_LAST_EVENT_ID: Final = QueryParameter(
    "lastEventId", "string", "as the header Last-Event-ID, for who cannot set one; the header wins"
)


class EventRoutes:
    """The handler for the stream of events."""

    def __init__(self, services: Services) -> None:
        self._events = services.events
        self._registry = services.registry
        self._documents = EventDocuments(services.events.life, self._model_bytes)

    def routes(self) -> tuple[Route, ...]:
        """The route, with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/events",
                self.get_events,
                Access.READ,
                "What changes from now on, or from Last-Event-ID on; does not end by itself",
                "agent",
                {200: StreamForm.SSE.value},
                errors=(ServiceUnavailable, TooManyStreams),
                query=(_TYPES, _MODEL_ID, _LAST_EVENT_ID),
                streamed=EventAnswer,
            ),
        )

    async def get_events(self, request: web.Request) -> web.StreamResponse:
        """GET /api/events."""
        selection = _selection(request)
        gap, after = self._place(request.headers.get("Last-Event-ID") or request.query.get("lastEventId", ""))
        items = self._items(selection, gap, after, self._events.last)
        return await stream(request, items, form_of(request, StreamForm.SSE))

    def _place(self, last_event_id: str) -> tuple[GapReason | None, int]:
        """After which event to go on, and why not right after the one that the client has."""
        if not last_event_id:
            return None, self._events.last
        found = _ID.fullmatch(last_event_id)
        if found is None:
            return "unknownId", self._events.last
        if found[1] != self._events.life:
            return "agentRestarted", self._events.last
        number = int(found[2])
        if number > self._events.last:
            return "unknownId", self._events.last
        if number + 1 < self._events.first:
            return "tooOld", self._events.last
        return None, number

    async def _items(
        self, selection: Selection, gap: GapReason | None, after: int, already: int
    ) -> AsyncIterator[Item]:
        """What is streamed; the events up to ``already`` had happened when the client asked."""
        with self._events.subscribe(after) as subscription:
            # Who loses the connection before anything happens is to miss nothing either.
            yield self._gap(gap, after) if gap else Item(b"", id=self._documents.id(after))
            lost = passed_over = 0
            while True:
                numbered = await subscription.next_numbered()
                if subscription.lost != lost:
                    lost = subscription.lost
                    subscription.skip()
                    yield self._gap("tooSlow", self._events.last)
                elif selection.takes(numbered.event) and not (
                    # How far something had come once is no news.
                    isinstance(numbered.event, ServerProgress) and numbered.number <= already
                ):
                    passed_over = 0
                    yield self._documents.item(numbered)
                elif (passed_over := passed_over + 1) % _PASSED_OVER == 0:
                    yield Item(b"", id=self._documents.id(numbered.number))

    def _gap(self, reason: GapReason, number: int) -> Item:
        message = f"{_GAPS[reason]}: what you show may be out of date, ask for it again"
        return item_of(GapEvent(id=self._documents.id(number), at=datetime.now(UTC), reason=reason, message=message))

    def _model_bytes(self, model_id: str) -> int | None:
        model = self._registry.models.get(model_id)
        return model.facts.size_bytes if model else None


def _selection(request: web.Request) -> Selection:
    """Which events a request asks for. Raises ``ValidationFailed``."""
    types = set()
    for name in (name for text in request.query.getall("types", []) for name in text.split(",") if name):
        try:
            types.add(EventType(name))
        except ValueError:
            message = f"{name!r} is no kind of event; there are {', '.join(EventType)}"
            raise ValidationFailed([{"field": "types", "message": message}]) from None
    model_ids = {model_id for model_id in request.query.getall("modelId", []) if model_id}
    if len(model_ids) > _MOST_MODELS:
        raise ValidationFailed(
            [{"field": "modelId", "message": f"at most {_MOST_MODELS} models can be named, not {len(model_ids)}"}]
        )
    return Selection(frozenset(types), frozenset(model_ids))
