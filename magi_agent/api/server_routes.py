"""Servers: how they are, and the verbs that change what is wanted of them."""

from typing import Any, Final
from urllib.parse import quote

from aiohttp import web

from magi_agent.api.etag import answer_unless_known, tagged
from magi_agent.api.exchange import ASKED, CALLER, answer, flag_of, location, wait_of
from magi_agent.api.representations import operation_answer, server_answer
from magi_agent.api.routes import FORCE, WAIT, Access, Route
from magi_agent.api.schemas import OperationAnswer, ServerActionAnswer, ServerAnswer, ServersAnswer
from magi_agent.api.services import Services
from magi_agent.api.systemd_reach import require_systemd
from magi_agent.errors import (
    Draining,
    InsufficientMemory,
    ModelNotFound,
    ModelNotUsable,
    NoFreePort,
    OperationNotFound,
    RegistrySaveFailed,
    ServiceUnavailable,
    SettingsNotUsable,
    StartFailed,
    StopFailed,
)
from magi_agent.servers.operations import Operation
from magi_agent.servers.servers import Outcome

_TAG: Final = "servers"
_SAVING: Final = (ModelNotFound, RegistrySaveFailed, ServiceUnavailable)
_STARTING: Final = (
    *(*_SAVING, ModelNotUsable, SettingsNotUsable, InsufficientMemory, NoFreePort, Draining),
    *(StartFailed, StopFailed),
)
_ON_ONE: Final[dict[int, Any]] = {200: ServerActionAnswer, 202: ServerActionAnswer}
_ON_SEVERAL: Final[dict[int, Any]] = {200: OperationAnswer, 202: OperationAnswer}


class ServerRoutes:
    """The handlers for servers."""

    def __init__(self, services: Services) -> None:
        self._servers = services.servers
        self._manager = services.manager

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/models/servers",
                self.list_servers,
                Access.READ,
                "Every model that should run or has a loaded unit",
                _TAG,
                {200: ServersAnswer},
                errors=(ServiceUnavailable,),
                conditional=True,
            ),
            Route(
                "POST",
                "/api/models/servers/start-all",
                self.start_all_servers,
                Access.ADMIN,
                "Start every enabled model",
                _TAG,
                _ON_SEVERAL,
                errors=(ServiceUnavailable, Draining),
                query=(WAIT,),
            ),
            Route(
                "POST",
                "/api/models/servers/stop-all",
                self.stop_all_servers,
                Access.ADMIN,
                "Stop every model that runs",
                _TAG,
                _ON_SEVERAL,
                errors=(ServiceUnavailable,),
                query=(WAIT,),
            ),
            Route(
                "POST",
                "/api/models/servers/restart-changed",
                self.restart_changed_servers,
                Access.ADMIN,
                "Restart every server that differs from how it would be started now, one after the other",
                _TAG,
                _ON_SEVERAL,
                errors=(ServiceUnavailable, Draining),
                query=(WAIT,),
            ),
            Route(
                "GET",
                "/api/models/servers/{modelId}",
                self.get_server,
                Access.READ,
                "One model's server, running or not",
                _TAG,
                {200: ServerAnswer},
                errors=(ModelNotFound, ServiceUnavailable),
            ),
            Route(
                "POST",
                "/api/models/servers/{modelId}/start",
                self.start_server,
                Access.ADMIN,
                "Start a model's server",
                _TAG,
                _ON_ONE,
                errors=_STARTING,
                query=(WAIT, FORCE),
            ),
            Route(
                "POST",
                "/api/models/servers/{modelId}/stop",
                self.stop_server,
                Access.ADMIN,
                "Stop a model's server",
                _TAG,
                _ON_ONE,
                errors=(*_SAVING, StopFailed),
                query=(WAIT,),
            ),
            Route(
                "POST",
                "/api/models/servers/{modelId}/restart",
                self.restart_server,
                Access.ADMIN,
                "Stop a model's server and start it with the settings of now",
                _TAG,
                _ON_ONE,
                errors=_STARTING,
                query=(WAIT, FORCE),
            ),
            Route(
                "GET",
                "/api/operations/{operationId}",
                self.get_operation,
                Access.READ,
                "How far an action on several models has come",
                _TAG,
                {200: OperationAnswer},
                errors=(OperationNotFound,),
            ),
        )

    async def list_servers(self, request: web.Request) -> web.Response:
        """GET /api/models/servers."""
        await require_systemd(self._manager)
        servers = [server_answer(server) for server in await self._servers.list()]
        content = ServersAnswer(
            total_servers=len(servers),
            ready_servers=sum(server.is_ready for server in servers),
            servers=servers,
        )
        return answer_unless_known(request, await tagged(content.model_dump_json(by_alias=True).encode()))

    async def get_server(self, request: web.Request) -> web.Response:
        """GET /api/models/servers/{modelId}."""
        await require_systemd(self._manager)
        return answer(server_answer(await self._servers.server(request.match_info["modelId"])))

    async def start_server(self, request: web.Request) -> web.Response:
        """POST /api/models/servers/{modelId}/start."""
        await require_systemd(self._manager)
        model_id, by, wait = request.match_info["modelId"], request[CALLER].name, wait_of(request)
        forced = _forced(request)
        return _on_one(request, await self._servers.start(model_id, by=by, wait=wait, forced=forced))

    async def stop_server(self, request: web.Request) -> web.Response:
        """POST /api/models/servers/{modelId}/stop."""
        await require_systemd(self._manager)
        model_id, by, wait = request.match_info["modelId"], request[CALLER].name, wait_of(request)
        return _on_one(request, await self._servers.stop(model_id, by=by, wait=wait))

    async def restart_server(self, request: web.Request) -> web.Response:
        """POST /api/models/servers/{modelId}/restart."""
        await require_systemd(self._manager)
        model_id, by, wait = request.match_info["modelId"], request[CALLER].name, wait_of(request)
        forced = _forced(request)
        return _on_one(request, await self._servers.restart(model_id, by=by, wait=wait, forced=forced))

    async def start_all_servers(self, request: web.Request) -> web.Response:
        """POST /api/models/servers/start-all."""
        await require_systemd(self._manager)
        wait = wait_of(request)
        return await self._on_several(request, self._servers.start_all(by=request[CALLER].name), wait)

    async def stop_all_servers(self, request: web.Request) -> web.Response:
        """POST /api/models/servers/stop-all."""
        await require_systemd(self._manager)
        wait = wait_of(request)
        return await self._on_several(request, self._servers.stop_all(by=request[CALLER].name), wait)

    async def restart_changed_servers(self, request: web.Request) -> web.Response:
        """POST /api/models/servers/restart-changed."""
        await require_systemd(self._manager)
        wait = wait_of(request)
        operation = await self._servers.restart_changed(by=request[CALLER].name)
        return await self._on_several(request, operation, wait)

    async def get_operation(self, request: web.Request) -> web.Response:
        """GET /api/operations/{operationId}."""
        return answer(self._as_it_is(self._servers.operations.operation(request.match_info["operationId"])))

    async def _on_several(self, request: web.Request, operation: Operation, wait: float) -> web.Response:
        ended = await self._servers.operations.finished(operation, wait)
        return answer(
            self._as_it_is(operation),
            status=200 if ended else 202,
            headers=None if ended else location(request, f"/api/operations/{operation.operation_id}"),
        )

    def _as_it_is(self, operation: Operation) -> OperationAnswer:
        return operation_answer(operation, {model_id: self._servers.state(model_id) for model_id in operation.parts})


def _on_one(request: web.Request, outcome: Outcome) -> web.Response:
    model_id = outcome.server.model_id
    path = f"/api/models/servers/{quote(model_id, safe='')}"
    return answer(
        ServerActionAnswer(
            message=outcome.message,
            model_id=model_id,
            changed=outcome.changed,
            server=server_answer(outcome.server),
        ),
        status=200 if outcome.settled else 202,
        headers=None if outcome.settled else location(request, path),
    )


def _forced(request: web.Request) -> bool:
    forced = flag_of(request, "force")
    if forced:
        # What the journal has of a change is its path and its body, and this is in neither.
        request[ASKED] = "by force"
    return forced
