"""Entity tags: what a caller has already is not sent to it again. RFC 9110, sections 8.8.3 and 13.1.2.

A tag is a digest of the body, so it holds for as long as the body is the same: whatever else was changed meanwhile,
and across restarts of the agent.
"""

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from magi_agent.api.exchange import answer

_DIGEST_BYTES: Final = 16
_LARGE: Final = 256 * 1024
"""Bytes whose digest takes so long, about half a millisecond, that a thread is worth its cost."""


@dataclass(frozen=True, slots=True)
class TaggedBody:
    """A JSON body with its entity tag."""

    content: bytes
    tag: str
    """Without the quotes that it has on the wire."""


async def tagged(content: bytes) -> TaggedBody:
    """Return a body with its tag; asking again for the same costs the same, so it is to be kept."""
    return TaggedBody(content, await asyncio.to_thread(_tag, content) if len(content) > _LARGE else _tag(content))


def answer_unless_known(request: web.Request, body: TaggedBody) -> web.Response:
    """Return the answer to a GET: the body, or 304 without one where ``If-None-Match`` says that the caller has it."""
    response = web.Response(status=304) if _is_known(request, body.tag) else answer(body.content)
    response.etag = body.tag
    # It may be kept, and is to be asked for each time: nobody can tell how long it holds.
    response.headers["Cache-Control"] = "no-cache"
    return response


def _is_known(request: web.Request, tag: str) -> bool:
    # By the weak comparison, to which W/"x" and "x" are the same. A tag may be called *, but only with quotes.
    return request.headers.get("If-None-Match") == "*" or any(
        known.value == tag for known in request.if_none_match or ()
    )


def _tag(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
