"""Whether the agent lives, whether each server that should be up is ready, and which requests would be answered.

Open to everybody. What is said of a model, a tier or ``auto`` is for load balancers, which ask all the time: it comes
of what is known already, no server is asked, and no model counts as used.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final

from aiohttp import web

from magi_agent import __version__
from magi_agent.api.connection import connection_of
from magi_agent.api.exchange import answer, tier_named
from magi_agent.api.representations import readable
from magi_agent.api.routes import Access, QueryParameter, Route
from magi_agent.api.schemas import AvailabilityAnswer, LiveAnswer, ReadyAnswer
from magi_agent.api.services import Services
from magi_agent.errors import InvalidTier, ServiceUnavailable, ValidationFailed
from magi_agent.gateway.automatic import AUTO, Automatic
from magi_agent.gateway.model_names import ModelNames, UnknownName
from magi_agent.gateway.senses import Sense
from magi_agent.gateway.tiers import Kind
from magi_agent.registry.model import Model

_TAG: Final = "health"
_MOST_PROBLEMS: Final = 100
_UNAVAILABLE: Final = 503
_ON_DEMAND: Final = QueryParameter(
    "onDemand", "boolean", "whether an `onDemand` model that a request would have started counts as ready"
)
_FLAG: Final = ("true", "false")
_KIND: Final = QueryParameter(
    "kind", "string", f"what the model has to be for: {', '.join(Kind)}; `{Kind.COMPLETION}` where nothing is said"
)

_SENSES: Final = {
    Sense.VISION: QueryParameter("vision", "boolean", "whether the model has to see images"),
    Sense.AUDIO: QueryParameter("audio", "boolean", "whether the model has to hear sound"),
}


class HealthRoutes:
    """The handlers for health."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._names = ModelNames(services.registry, services.effective)
        self._automatic = Automatic(self._names, services.tiers, services.active_profile)
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
            Route(
                "GET",
                "/health/models/{model}",
                self.get_model_health,
                Access.OPEN,
                "Whether a request for a model would be answered",
                _TAG,
                {200: AvailabilityAnswer, 503: AvailabilityAnswer},
                query=(_ON_DEMAND,),
            ),
            Route(
                "GET",
                "/health/tiers/{tier}",
                self.get_tier_health,
                Access.OPEN,
                "Whether a request for a tier would be answered",
                _TAG,
                {200: AvailabilityAnswer, 503: AvailabilityAnswer},
                query=(_ON_DEMAND, _KIND, *_SENSES.values()),
                errors=(InvalidTier,),
            ),
            Route(
                "GET",
                "/health/auto",
                self.get_automatic_health,
                Access.OPEN,
                "Whether a request for `auto` would be answered, however hard it is",
                _TAG,
                {200: AvailabilityAnswer, 503: AvailabilityAnswer},
                query=(_ON_DEMAND, _KIND, *_SENSES.values()),
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

    async def get_model_health(self, request: web.Request) -> web.Response:
        """GET /health/models/{model}; of what there is not, no more is said than of what is not ready."""
        on_demand = _is_set(request, _ON_DEMAND)
        await self._opened(request)
        return _availability(is_available=self._is_available(request.match_info["model"], on_demand=on_demand))

    async def get_tier_health(self, request: web.Request) -> web.Response:
        """GET /health/tiers/{tier}."""
        tier = tier_named(request.match_info["tier"])
        kind, needs, on_demand = _kind(request), _needs(request), _is_set(request, _ON_DEMAND)
        await self._opened(request)
        try:
            prospect = self._services.tiers.prospect(tier, kind, needs)
        except ServiceUnavailable:
            return _availability(is_available=False)
        return _availability(is_available=prospect.is_good(on_demand=on_demand))

    async def get_automatic_health(self, request: web.Request) -> web.Response:
        """GET /health/auto; where a model is called so, it is that model's health."""
        kind, needs, on_demand = _kind(request), _needs(request), _is_set(request, _ON_DEMAND)
        await self._opened(request)
        try:
            if self._automatic.is_meant(AUTO):
                return _availability(is_available=self._automatic.is_available(kind, needs, on_demand=on_demand))
        except ServiceUnavailable:
            return _availability(is_available=False)
        return _availability(is_available=self._is_available(AUTO, on_demand=on_demand))

    def _is_available(self, name: str, *, on_demand: bool) -> bool:
        """Whether a request for one model would be answered."""
        try:
            model = self._names.model(name)
        except (UnknownName, ServiceUnavailable):
            return False
        lanes = self._services.lanes
        return lanes.is_up(model.model_id) or (on_demand and lanes.can_start(model))

    async def _opened(self, request: web.Request) -> None:
        """Wait as requests to models do where the agent has just come up: they would be answered, and this says so."""
        if not self._services.opening.is_open:
            connection_of(request).cancel_when_lost()
            await self._services.opening.wait()

    async def _problems(self) -> list[str]:
        """Everything that is known to be wrong, in sentences."""
        problems = await self._services.problems.known()
        left_out = len(problems) - _MOST_PROBLEMS
        if left_out > 0:
            problems = [*problems[:_MOST_PROBLEMS], f"and {left_out} more"]
        return [readable(problem) for problem in problems]


def _availability(*, is_available: bool) -> web.Response:
    if is_available:
        return answer(AvailabilityAnswer(status="ready"))
    return answer(AvailabilityAnswer(status="not_ready"), status=_UNAVAILABLE)


def _kind(request: web.Request) -> Kind:
    return Kind(_chosen(request, _KIND, tuple(Kind), Kind.COMPLETION))


def _needs(request: web.Request) -> frozenset[Sense]:
    return frozenset(sense for sense, key in _SENSES.items() if _is_set(request, key))


def _is_set(request: web.Request, key: QueryParameter) -> bool:
    return _chosen(request, key, _FLAG, "false") == "true"


def _chosen(request: web.Request, key: QueryParameter, words: Sequence[str], default: str) -> str:
    """What the query string says, which is one of some words. Raises ``ValidationFailed``."""
    text = request.query.get(key.name, default)
    if text not in words:
        raise ValidationFailed([{"field": key.name, "message": f"must be {' or '.join(words)}, not {text!r}"}])
    return text
