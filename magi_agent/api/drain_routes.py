"""Draining the host: what runs goes on, and nothing is started any more."""

from typing import Final

from aiohttp import web

from magi_agent.api.exchange import CALLER, answer, body_of
from magi_agent.api.routes import Access, Route
from magi_agent.api.schemas import DrainAnswer, DrainRequest
from magi_agent.api.services import Services
from magi_agent.errors import RegistrySaveFailed, ServiceUnavailable

_TAG: Final = "servers"


class DrainRoutes:
    """The handlers for draining."""

    def __init__(self, services: Services) -> None:
        self._servers = services.servers

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/drain",
                self.get_drain,
                Access.READ,
                "Whether the host is being drained",
                _TAG,
                {200: DrainAnswer},
            ),
            Route(
                "PUT",
                "/api/drain",
                self.set_drain,
                Access.ADMIN,
                "Start nothing any more, until the host is booted or this is taken back; what runs goes on",
                _TAG,
                {200: DrainAnswer},
                body=DrainRequest,
                errors=(RegistrySaveFailed, ServiceUnavailable),
            ),
        )

    async def get_drain(self, _: web.Request) -> web.Response:
        """GET /api/drain."""
        return self._answer()

    async def set_drain(self, request: web.Request) -> web.Response:
        """PUT /api/drain."""
        body = await body_of(request, DrainRequest)
        await self._servers.set_drain(body.draining, by=request[CALLER].name)
        return self._answer()

    def _answer(self) -> web.Response:
        drain = self._servers.drain
        message = "nothing is started any more" if drain else "servers are started as they are wanted"
        return answer(
            DrainAnswer(
                message=message,
                draining=drain is not None,
                since=drain.since if drain else None,
                by=drain.by if drain else None,
            )
        )
