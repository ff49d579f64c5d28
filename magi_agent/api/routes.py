"""The route table: one entry for each method and path, from which routing, access and the OpenAPI document are made."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from aiohttp import web
from pydantic import BaseModel

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
    body: type[BaseModel] | None = None
    errors: tuple[type[MagiError], ...] = ()
    query: tuple[QueryParameter, ...] = ()


WAIT: Final = QueryParameter("wait", "number", "seconds to wait for the outcome; without it the answer comes at once")
APPLY: Final = QueryParameter("apply", "boolean", "start or stop the server at once, as the choice says")
MAX_WAIT: Final = 12_000.0
"""Seconds; as long as ``magictl`` ever waits."""
