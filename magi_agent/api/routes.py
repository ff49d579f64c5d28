"""The route table: one entry for each method and path, from which routing, access and the OpenAPI document are made."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

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
    answers: dict[int, object]
    """What each success status comes with: a pydantic model, a list of one, or ``None``."""
    body: type[BaseModel] | None = None
    errors: tuple[type[MagiError], ...] = ()
    query: tuple[QueryParameter, ...] = ()


WAIT: Final = QueryParameter("wait", "number", "seconds to wait for the outcome; without it the answer comes at once")
MAX_WAIT: Final = 3600.0
