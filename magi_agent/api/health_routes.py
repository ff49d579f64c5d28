"""Whether the agent lives, and whether each server that should be up is ready. Open to everybody."""

from collections.abc import Collection, Mapping
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
from magi_agent.servers.servers import UP
from magi_agent.vocabulary import StartPolicy

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
        try:
            models = services.registry.models
            is_loaded = True
        except ServiceUnavailable as error:
            problems.insert(0, error.message)
            is_loaded = False
        wanted = {
            model_id: state
            for model_id, state in services.servers.wanted().items()
            if model_id not in models or services.effective.start_policy(models[model_id]) is not StartPolicy.ON_DEMAND
        }
        missing = {model_id: state for model_id, state in sorted(wanted.items()) if state not in UP}
        is_connected = services.manager.connected
        is_ready = is_loaded and is_connected and services.is_settled() and not missing
        unknown: Collection[str] = services.servers.unknown_units() if is_loaded else ()
        return answer(
            ReadyAnswer(
                status="ready" if is_ready else "not_ready",
                version=__version__,
                systemd_scope=services.settings.systemd_scope,
                systemd_connected=is_connected,
                models=len(models),
                enabled_models=sum(model.choices.enabled for model in models.values()),
                servers_wanted=len(wanted),
                servers_ready=len(wanted) - len(missing),
                missing=missing,
                scanning=services.inventory.scanning,
                active_profile=services.active_profile.slug,
                problems=problems,
                draining=services.servers.drain is not None,
                unknown_units=list(unknown),
            ),
            status=200 if is_ready else 503,
        )

    async def _problems(self) -> list[str]:
        """Everything that is known to be wrong, in sentences."""
        services = self._services
        _, unreadable = await services.profiles.survey()
        # The gravest first: a long list is cut at its end.
        problems = [] if services.manager.connected else ["systemd is not reachable, so nobody knows what runs now"]
        if not services.is_settled():
            problems.append("the agent is still starting: what should run is not known yet")
        if services.inventory.scanning:
            problems.append("the first scan is still under way")
        if driver := await services.host.nvidia_problem():
            problems.append(driver)
        problems += services.servers.problems
        problems += services.configuration.problems
        problems += services.registry.problems
        if services.active_profile.problem:
            problems.append(services.active_profile.problem)
        problems += [f"profile {problem.name}: {problem.path}: {problem.message}" for problem in unreadable]
        problems += [f"{problem.path}: {problem.message}" for problem in services.inventory.problems]
        left_out = len(problems) - _MOST_PROBLEMS
        if left_out > 0:
            problems = [*problems[:_MOST_PROBLEMS], f"and {left_out} more"]
        return [readable(problem) for problem in problems]
