"""Logs and histories of the models' servers."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final, TypeVar

import pydantic_core
from aiohttp import web
from pydantic import BaseModel, ValidationError

from magi_agent.api.exchange import answer, array, errors_on_wire
from magi_agent.api.log_schemas import (
    MOST_EVENTS,
    MOST_LINES,
    HistoryAnswer,
    HistoryEventAnswer,
    HistoryQuery,
    LogAnswer,
    LogEntryAnswer,
    LogQuery,
    in_query,
)
from magi_agent.api.routes import Access, QueryParameter, Route
from magi_agent.api.services import Services
from magi_agent.api.streaming import Item, Share, StreamForm, form_of, refuse_another, stream
from magi_agent.errors import ModelNotFound, ServiceUnavailable, TooManyStreams, ValidationFailed
from magi_agent.servers.server_log import Excerpt, LogEntry
from magi_agent.systemd.journal import is_cursor

_TAG: Final = "servers"
_MOST_BYTES: Final = 8 << 20
"""Of the entries of one answer."""
_LOOKED_THROUGH: Final = 200_000
"""Entries in which those that are important enough are looked for."""
_TURN: Final = 64
"""Entries that are made ready before others have their turn."""
_LAST_SEEN: Final = "Last-Event-ID"
_FOLLOWED: Final = Share("followed logs", 8)
"""Half of the programs that may wait for what is to come: one runs for each."""
_Query = TypeVar("_Query", bound=BaseModel)

_LOG_KEYS: Final = (
    QueryParameter("lines", "integer", "entries at the most, the newest ones; 100 where it is left out", MOST_LINES),
    QueryParameter("since", "string", "only what is newer: ISO 8601, or `-1h`, `10 min ago`, `yesterday`"),
    QueryParameter("until", "string", "only what is older, likewise"),
    QueryParameter("priority", "string", "only what is as important: `err`, `warning`, `info`, …, or a number, 0 to 7"),
    QueryParameter("run", "string", "`all`, `current` (or the last one), `previous`, or a run's `invocationId`"),
    QueryParameter("cursor", "string", "only what comes after this entry, the oldest first"),
    QueryParameter("before", "string", "only what stands before this entry: to page back"),
    QueryParameter(
        "follow", "boolean", "go on with what is yet to come, as server-sent events or NDJSON, as `Accept` says"
    ),
)


class LogRoutes:
    """The handlers for what servers said, and for what happened to them."""

    def __init__(self, services: Services) -> None:
        self._registry = services.registry
        self._logs = services.logs
        self._history = services.history

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/models/servers/{modelId}/logs",
                self.get_log,
                Access.READ,
                "What a model's server printed, and what systemd said of it",
                _TAG,
                {200: LogAnswer},
                errors=(ModelNotFound, ServiceUnavailable, TooManyStreams),
                query=_LOG_KEYS,
                streamed=LogEntryAnswer,
            ),
            Route(
                "GET",
                "/api/models/{modelId}/history",
                self.get_history,
                Access.READ,
                "What happened to a model's server, and who asked for it",
                _TAG,
                {200: HistoryAnswer},
                errors=(ModelNotFound, ServiceUnavailable),
                query=(
                    QueryParameter(
                        "limit", "integer", "events at the most, the newest ones; 100 where it is left out", MOST_EVENTS
                    ),
                ),
            ),
        )

    async def get_log(self, request: web.Request) -> web.StreamResponse:
        """GET /api/models/servers/{modelId}/logs."""
        model_id = self._registry.model(request.match_info["modelId"]).model_id
        wanted = _query_of(request, LogQuery)
        if wanted.follow:
            return await self._follow(request, model_id, wanted)
        if wanted.cursor is not None:
            entries, truncated = await _collected(
                self._logs.after(model_id, wanted.excerpt, wanted.cursor), wanted.excerpt, wanted.lines
            )
        else:
            entries, truncated = await self._newest(model_id, wanted)
        cursor = entries[-1].id if entries else wanted.cursor
        return answer(
            b'{"modelId":%b,"entries":%b,"cursor":%b,"truncated":%b}'
            % (
                pydantic_core.to_json(model_id),
                array([entry.data for entry in entries]),
                pydantic_core.to_json(cursor),
                pydantic_core.to_json(truncated),
            )
        )

    async def get_history(self, request: web.Request) -> web.Response:
        """GET /api/models/{modelId}/history."""
        model_id = self._registry.model(request.match_info["modelId"]).model_id
        past = await self._history.of(model_id, _query_of(request, HistoryQuery).limit)
        if not past.events:
            _ = await self._logs.end()  # raises where that is for want of a journal
        events = [
            HistoryEventAnswer(
                at=event.at,
                event=event.event,
                message=event.message,
                by=event.by,
                result=event.result,
                exit_status=event.exit_status,
                signal=event.signal,
                invocation_id=event.invocation_id,
                forced=event.is_forced,
            )
            for event in past.events
        ]
        return answer(HistoryAnswer(model_id=model_id, events=events, truncated=past.truncated))

    async def _newest(self, model_id: str, wanted: LogQuery) -> tuple[list[Item], bool]:
        entries, truncated = await _collected(
            self._logs.newest(model_id, wanted.excerpt, before=wanted.before), wanted.excerpt, wanted.lines
        )
        if not entries and wanted.lines:
            _ = await self._logs.end()  # raises where that is for want of a journal
        return entries[::-1], truncated

    async def _follow(self, request: web.Request, model_id: str, wanted: LogQuery) -> web.StreamResponse:
        cursor = wanted.cursor
        if last_seen := request.headers.get(_LAST_SEEN):
            if not is_cursor(last_seen):
                raise ValidationFailed([{"field": _LAST_SEEN, "message": "must be an id that this stream had before"}])
            cursor = last_seen
        refuse_another(request, _FOLLOWED)
        self._logs.refuse_where_full()
        before: list[Item] = []
        if cursor is None:
            # First the end: what comes while the last lines are read is not missed.
            cursor = await self._logs.end()
            before, _ = await self._newest(model_id, wanted)
            # Who loses the connection before anything comes is to miss nothing either.
            before = before or [Item(b"", id=cursor)]
            cursor = before[-1].id or cursor
        coming = self._logs.follow(model_id, wanted.excerpt, cursor)
        return await stream(
            request, _joined(before, coming, wanted.excerpt), form_of(request, StreamForm.SSE), _FOLLOWED
        )


async def _joined(
    before: list[Item], coming: AsyncGenerator[LogEntry, None], wanted: Excerpt
) -> AsyncGenerator[Item, None]:
    """What was there, then what comes; the first is let go of piece by piece."""
    waiting = deque(before)
    before.clear()
    async with contextlib.aclosing(coming):
        while waiting:
            yield waiting.popleft()
        async for entry in coming:
            if wanted.counts(entry):
                yield _item(entry)


async def _collected(entries: AsyncGenerator[LogEntry, None], wanted: Excerpt, most: int) -> tuple[list[Item], bool]:
    """The first entries that count, in their order, and whether there may be more."""
    found: list[Item] = []
    left, looked_at = _MOST_BYTES, 0
    async with contextlib.aclosing(entries):
        async for entry in entries:
            looked_at += 1
            if looked_at % _TURN == 0:
                await asyncio.sleep(0)
            if not wanted.counts(entry):
                if looked_at == _LOOKED_THROUGH:
                    return found, True
                continue
            item = _item(entry)
            left -= len(item.data)
            if len(found) == most or (left < 0 and found):
                return found, True
            found.append(item)
    return found, False


def _item(entry: LogEntry) -> Item:
    shown = LogEntryAnswer(
        at=entry.at,
        message=entry.message,
        priority=entry.priority,
        pid=entry.pid,
        invocation_id=entry.invocation_id,
        source="systemd" if entry.is_systemds else "server",
        cursor=entry.cursor,
    )
    return Item(shown.model_dump_json(by_alias=True).encode(), id=entry.cursor)


def _query_of(request: web.Request, model: type[_Query]) -> _Query:
    """The query string, validated. Raises ``ValidationFailed``."""
    try:
        return model.model_validate(in_query(model, request.query))
    except ValidationError as error:
        raise ValidationFailed(errors_on_wire(error, lambda place: ".".join(map(str, place)))) from None
