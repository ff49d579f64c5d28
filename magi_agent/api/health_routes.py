"""Whether the agent lives, and whether each server that should be up is ready. Open to everybody."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final

from aiohttp import web

from magi_agent import __version__
from magi_agent.api.exchange import answer
from magi_agent.api.representations import readable
from magi_agent.api.routes import Access, Route
from magi_agent.api.schemas import LiveAnswer, ReadyAnswer
from magi_agent.api.services import Services
from magi_agent.errors import ServiceUnavailable
from magi_agent.registry.model import Model

_TAG: Final = "health"
_MOST_PROBLEMS: Final = 100


class HealthRoutes:
    """The handlers for health."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._alive = LiveAnswer().model_dump_json(by_alias=True).encode()

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/health/live",
                self.get_live,
                Access.OPEN,
                "Whether the agent's loop turns",
                _TAG,
                {200: LiveAnswer},
            ),
            Route(
                "GET",
                "/health/ready",
                self.get_ready,
                Access.OPEN,
                "Whether each server that should be up is ready",
                _TAG,
                {200: ReadyAnswer, 503: ReadyAnswer},
            ),
        )

    async def get_live(self, _: web.Request) -> web.Response:
        """GET /health/live."""
        return answer(self._alive)

    async def get_ready(self, _: web.Request) -> web.Response:
        """GET /health/ready."""
        services = self._services
        problems = await self._problems()
        models: Mapping[str, Model] = {}
        with suppress(ServiceUnavailable):  # which is among the problems
            models = services.registry.models
        found = services.readiness()
        unknown: Collection[str] = services.servers.unknown_units() if found.is_loaded else ()
        return answer(
            ReadyAnswer(
                status="ready" if found.is_ready else "not_ready",
                version=__version__,
                systemd_scope=services.settings.systemd_scope,
                systemd_connected=found.is_connected,
                models=len(models),
                enabled_models=sum(model.choices.enabled for model in models.values()),
                servers_wanted=len(found.wanted),
                servers_ready=len(found.wanted) - len(found.missing),
                missing=found.missing,
                scanning=services.inventory.scanning,
                active_profile=services.active_profile.slug,
                problems=problems,
                draining=services.servers.drain is not None,
                unknown_units=list(unknown),
            ),
            status=200 if found.is_ready else 503,
        )

    async def _problems(self) -> list[str]:
        """Everything that is known to be wrong, in sentences."""
        problems = await self._services.problems.known()
        left_out = len(problems) - _MOST_PROBLEMS
        if left_out > 0:
            problems = [*problems[:_MOST_PROBLEMS], f"and {left_out} more"]
        return [readable(problem) for problem in problems]
