"""The API as one application: the route table, the router and what is around every handler."""

from typing import Final

from aiohttp import web

from magi_agent.api.about_routes import AboutRoutes
from magi_agent.api.access import Admission, Identify, group_id
from magi_agent.api.answering import answering
from magi_agent.api.configuration_routes import ConfigurationRoutes
from magi_agent.api.cors import CrossOrigin
from magi_agent.api.counted_requests import CountedRequests
from magi_agent.api.drain_routes import DrainRoutes
from magi_agent.api.event_routes import EventRoutes
from magi_agent.api.health_routes import HealthRoutes
from magi_agent.api.host_routes import HostRoutes
from magi_agent.api.log_routes import LogRoutes
from magi_agent.api.memory_routes import MemoryRoutes
from magi_agent.api.metrics_routes import MetricsRoutes
from magi_agent.api.model_routes import ModelRoutes
from magi_agent.api.profile_routes import ProfileRoutes
from magi_agent.api.routes import Access, Route
from magi_agent.api.server_routes import ServerRoutes
from magi_agent.api.services import Services
from magi_agent.api.settings_routes import SettingsRoutes
from magi_agent.api.streaming import add_streams
from magi_agent.api.transfer_routes import TransferRoutes
from magi_agent.api.usage_routes import UsageRoutes
from magi_agent.gateway.routes import GatewayRoutes
from magi_agent.vocabulary import RESERVED_IDS

MAX_BODY: Final = 1 << 20
_ONE_MODEL: Final = "/api/models/{modelId}"


def make_application(services: Services, *, identify: Identify | None = None) -> web.Application:
    """The application that answers from ``services``.

    ``identify`` says who makes a request and what they may do; without it the peer of the connection decides.
    """
    routes: list[Route] = []
    for group in (
        AboutRoutes(routes),
        ConfigurationRoutes(services),
        HealthRoutes(services),
        ModelRoutes(services),
        MemoryRoutes(services),
        ServerRoutes(services),
        LogRoutes(services),
        ProfileRoutes(services),
        SettingsRoutes(services),
        DrainRoutes(services),
        HostRoutes(services),
        TransferRoutes(services),
        EventRoutes(services),
        UsageRoutes(services),
        MetricsRoutes(services),
    ):
        routes += group.routes()
    routes += GatewayRoutes(services, services.connections, services.lanes).routes()
    identify = identify or Admission(services.configuration, group_id()).identify
    access: dict[object, Access] = {route.handler: route.access for route in routes}
    counted = CountedRequests(routes, services.metrics.requests)
    application = web.Application(
        middlewares=[answering(identify, access, CrossOrigin(services.configuration), counted)],
        client_max_size=MAX_BODY,
    )
    add_streams(application)
    for route in routes:
        path = _router_path(route.path)
        if route.method == "GET":
            application.router.add_get(path, route.handler)
        else:
            application.router.add_route(route.method, path, route.handler)
    return application


def _router_path(path: str) -> str:
    """``path`` for aiohttp's router, which must not take a reserved word for a model's id."""
    # What is below a path of the gateway's may have slashes in it, and so may an alias.
    path = path.replace("{path}", "{path:.+}").replace("{model}", "{model:(?s:.+)}")
    if not path.startswith(_ONE_MODEL):
        return path
    reserved = "|".join(sorted(RESERVED_IDS))
    return f"/api/models/{{modelId:(?!(?:{reserved})(?:/|$))[^{{}}/]+}}{path.removeprefix(_ONE_MODEL)}"
