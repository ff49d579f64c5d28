"""The agent itself: what it is, and how its API is used."""

import asyncio
from collections.abc import Sequence
from typing import Final

from aiohttp import web
from pydantic_core import to_json

from magi_agent import __version__
from magi_agent.api.docs_page import DocsPage
from magi_agent.api.exchange import CALLER, answer
from magi_agent.api.openapi import openapi_document
from magi_agent.api.routes import Access, Route
from magi_agent.api.schemas import RootAnswer

_TAG: Final = "agent"
_DOCS: Final = "/api/docs"


class AboutRoutes:
    """The handlers for the agent itself."""

    def __init__(self, all_routes: Sequence[Route]) -> None:
        """``all_routes`` is the whole route table; it may be filled later, before the first request."""
        self._all_routes = all_routes
        self._page = DocsPage()
        self._openapi: bytes | None = None

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route("GET", "/", self.get_root, Access.KNOWN, "What answers here", _TAG, {200: RootAnswer}),
            Route(
                "GET",
                "/api/openapi.json",
                self.get_openapi,
                Access.READ,
                "This API, in OpenAPI 3.1",
                _TAG,
                {200: None},
            ),
            Route("GET", _DOCS, self.get_docs, Access.READ, "This API, for people", _TAG, {200: "text/html"}),
        )

    async def get_root(self, request: web.Request) -> web.Response:
        """GET /."""
        docs = request[CALLER].prefix + _DOCS
        return answer(RootAnswer(name="magi-agent", version=__version__, docs=docs, status="running"))

    async def get_openapi(self, request: web.Request) -> web.Response:
        """GET /api/openapi.json."""
        if self._openapi is None:
            # It takes some 20 ms, which nobody else should have to wait for.
            self._openapi = to_json(await asyncio.to_thread(openapi_document, self._all_routes))
        servers = to_json([{"url": request[CALLER].prefix or "/"}])
        return answer(self._openapi[:-1] + b',"servers":' + servers + b"}")

    async def get_docs(self, _: web.Request) -> web.Response:
        """GET /api/docs."""
        return self._page.answer()
