"""The route table: one entry for each method and path, from which routing, access and the OpenAPI document are made."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Flag
from typing import Any, Final

from aiohttp import web

from magi_agent.errors import MagiError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access(Flag):
    """What a caller may do, and what a route asks for: a caller may do whatever includes that."""

    OPEN = 0
    KNOWN = 1
    """Anything at all: to see what answers here."""
    READ = 2 | KNOWN
    INFER = 4 | KNOWN
    """Use the models, and see nothing of how they are managed."""
    READ_AND_INFER = READ | INFER
    """Named: of members of several bits, Python 3.11.2 (Debian 12) makes something else of a union without a name."""
    ADMIN = 8 | READ_AND_INFER


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
    streamed: type[Any] | None = None
    """Of an answer that may go on: a pydantic model of each document in it."""
    conditional: bool = False
    """Whether its success has an ``ETag``, and is 304 without a body for who has it already."""


MAX_WAIT: Final = 12_000.0
"""Seconds; as long as ``magictl`` ever waits."""
WAIT: Final = QueryParameter(
    "wait", "number", "seconds to wait for the outcome; without it the answer comes at once", MAX_WAIT
)
APPLY: Final = QueryParameter("apply", "boolean", "start or stop the server at once, as the choice says")
FORCE: Final = QueryParameter("force", "boolean", "start it also where it does not fit into memory")
DRY_RUN: Final = QueryParameter("dryRun", "boolean", "say what would be changed, and change nothing")
