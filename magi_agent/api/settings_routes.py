"""Runtime settings and ports: how a model's server is run, as people choose it."""

from dataclasses import replace
from typing import Final
from urllib.parse import quote

from aiohttp import web

from magi_agent.api.exchange import (
    CALLER,
    answer,
    body_of,
    fault_on_wire,
    flag_of,
    location,
    runtime_settings_of,
    wait_of,
)
from magi_agent.api.representations import port_range_of
from magi_agent.api.routes import APPLY, WAIT, Access, Route
from magi_agent.api.schemas import (
    PortAnswer,
    PortRangeAnswer,
    PortRangeRequest,
    PortRequest,
    SettingsAnswer,
    SettingsChangedAnswer,
)
from magi_agent.api.services import Services
from magi_agent.api.systemd_reach import require_systemd
from magi_agent.errors import (
    Draining,
    InsufficientMemory,
    ModelNotFound,
    ModelNotUsable,
    NoFreePort,
    PortInUse,
    RegistrySaveFailed,
    ServiceUnavailable,
    SettingsNotUsable,
    StartFailed,
    StopFailed,
    ValidationFailed,
)
from magi_agent.registry.model import Model
from magi_agent.runtime_settings.settings import RuntimeSettings, wire_name

_TAG: Final = "settings"
_SAVING: Final = (ModelNotFound, RegistrySaveFailed, ServiceUnavailable)


class SettingsRoutes:
    """The handlers for runtime settings and ports."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/models/{modelId}/settings",
                self.get_settings,
                Access.READ,
                "What was chosen for a model's server, what holds, and where each setting was said",
                _TAG,
                {200: SettingsAnswer},
                errors=(ModelNotFound, ServiceUnavailable),
            ),
            Route(
                "PUT",
                "/api/models/{modelId}/settings",
                self.replace_settings,
                Access.ADMIN,
                "Replace what was chosen for a model's server; null goes back to the defaults",
                _TAG,
                {200: SettingsChangedAnswer, 202: SettingsChangedAnswer},
                body=RuntimeSettings,
                errors=(
                    *(*_SAVING, ModelNotUsable, SettingsNotUsable, InsufficientMemory, NoFreePort, Draining),
                    *(StartFailed, StopFailed),
                ),
                query=(APPLY, WAIT),
            ),
            Route(
                "PUT",
                "/api/models/{modelId}/port",
                self.set_port,
                Access.ADMIN,
                "Give a model another port; null takes its port back",
                _TAG,
                {200: PortAnswer},
                body=PortRequest,
                errors=(*_SAVING, PortInUse),
            ),
            Route(
                "PUT",
                "/api/models/port-range",
                self.set_port_range,
                Access.ADMIN,
                "Choose the range that ports are given from; null goes back to the configured one",
                _TAG,
                {200: PortRangeAnswer},
                body=PortRangeRequest,
                errors=(RegistrySaveFailed, ServiceUnavailable),
            ),
        )

    async def get_settings(self, request: web.Request) -> web.Response:
        """GET /api/models/{modelId}/settings."""
        model = self._services.registry.model(request.match_info["modelId"])
        return answer(SettingsAnswer(**await self._settings(model)))

    async def replace_settings(self, request: web.Request) -> web.Response:
        """PUT /api/models/{modelId}/settings."""
        services = self._services
        model = services.registry.model(request.match_info["modelId"])
        settings = await runtime_settings_of(request)
        apply, wait = flag_of(request, "apply"), wait_of(request)
        # What runs now is part of the answer, so it has to be known before anything is changed.
        await require_systemd(services.manager)
        if faults := await services.preparation.faults_of(settings):
            raise ValidationFailed([fault_on_wire(fault) for fault in faults])
        services.preparation.check_aliases(model.model_id, settings)
        if apply:
            services.servers.refuse_while_draining()
        model = await services.registry.choose(
            model.model_id, lambda choices: replace(choices, runtime_settings=settings)
        )
        server = await services.servers.server(model.model_id)
        settled = True
        if apply and (server.restart_reasons or (not server.is_running and services.servers.is_wanted(model.model_id))):
            # One that failed is tried again at once, since its settings may have been why.
            outcome = await services.servers.restart(model.model_id, by=request[CALLER].name, wait=wait)
            server, settled = outcome.server, outcome.settled
        path = f"/api/models/servers/{quote(model.model_id, safe='')}"
        return answer(
            SettingsChangedAnswer(
                message=f"Settings updated for {model.model_id}",
                **await self._settings(model),
                restart_required=bool(server.restart_reasons),
                restart_reasons=list(server.restart_reasons),
            ),
            status=200 if settled else 202,
            headers=None if settled else location(request, path),
        )

    async def _settings(self, model: Model) -> dict[str, object]:
        effective = self._services.effective
        return {
            "model_id": model.model_id,
            "runtime_settings": model.choices.runtime_settings,
            "effective": effective.of(model),
            "sources": {wire_name(name): source for name, source in effective.sources(model).items()},
            "warnings": list(await self._services.narrow_limits.of(model)),
        }

    async def set_port(self, request: web.Request) -> web.Response:
        """PUT /api/models/{modelId}/port."""
        services = self._services
        await require_systemd(services.manager)
        port = (await body_of(request, PortRequest)).port
        model_id = request.match_info["modelId"]
        runs = await services.servers.server(model_id) if model_id in services.registry.models else None
        held = runs.port if runs and runs.is_running else None
        model = await services.preparation.choose_port(model_id, port, held=held)
        server = await services.servers.server(model.model_id) if model.present else None
        return answer(
            PortAnswer(
                message=f"Port updated for {model.model_id}",
                model_id=model.model_id,
                port=model.choices.port,
                restart_required=bool(server and server.restart_reasons),
            )
        )

    async def set_port_range(self, request: web.Request) -> web.Response:
        """PUT /api/models/port-range."""
        services = self._services
        chosen = (await body_of(request, PortRangeRequest)).port_range
        await services.preparation.choose_port_range(port_range_of(chosen))
        low, high = services.preparation.port_range
        return answer(
            PortRangeAnswer(
                message="Port range updated",
                port_range=[low, high],
                outside=[
                    model_id
                    for model_id, model in services.registry.models.items()
                    if model.choices.port and not low <= model.choices.port <= high
                ],
            )
        )
