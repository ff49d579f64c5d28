"""The route table: one entry for each method and path, from which routing, access and the OpenAPI document are made."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from aiohttp import web

from magi_agent.errors import MagiError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access(IntEnum):
    """What a caller must be allowed to; each level includes those before it."""

    OPEN = 0
    READ = 1
    ADMIN = 2


@dataclass(frozen=True, slots=True)
class QueryParameter:
    """One key of the query string."""

    name: str
    kind: str
    """A JSON type."""
    description: str
    maximum: float | None = None
    """Of a number, which is at least 0."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path."""

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    tag: str
    answers: dict[int, Any]
    """What each success status comes with: a pydantic model, a list of one, the media type of what is no JSON, or
    ``None`` for any JSON object.
    """
    body: type[Any] | None = None
    """A pydantic model, or a dataclass that pydantic validates."""
    errors: tuple[type[MagiError], ...] = ()
    query: tuple[QueryParameter, ...] = ()
    conditional: bool = False
    """Whether its success has an ``ETag``, and is 304 without a body for who has it already."""


MAX_WAIT: Final = 12_000.0
"""Seconds; as long as ``magictl`` ever waits."""
WAIT: Final = QueryParameter(
    "wait", "number", "seconds to wait for the outcome; without it the answer comes at once", MAX_WAIT
)
APPLY: Final = QueryParameter("apply", "boolean", "start or stop the server at once, as the choice says")
DRY_RUN: Final = QueryParameter("dryRun", "boolean", "say what would be changed, and change nothing")
