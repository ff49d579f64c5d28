"""Memory: what a model's server needs, and uses."""

import contextlib
from typing import Final

from aiohttp import web

from magi_agent.api.exchange import answer
from magi_agent.api.memory_schemas import (
    MemoryAnswer,
    MemoryLimitAnswer,
    MemoryLimitsAnswer,
    MemoryNeedAnswer,
    MemoryPartsAnswer,
    SplitAnswer,
    UsedMemoryAnswer,
)
from magi_agent.api.representations import readable
from magi_agent.api.routes import Access, Route
from magi_agent.api.services import Services
from magi_agent.errors import ModelNotFound, ServiceUnavailable
from magi_agent.memory.need import MemoryNeed, NeedUnknown, Split
from magi_agent.servers.launch import unit_name
from magi_agent.servers.limited_launch import with_limits
from magi_agent.servers.llama_server import memory_limits_of, set_memory_limits_of
from magi_agent.servers.memory_limits import MemoryLimits, chosen_limits, source_of
from magi_agent.servers.narrow_limits import warnings_of
from magi_agent.servers.states import RUNNING
from magi_agent.systemd.errors import BusError

_TAG: Final = "models"


class MemoryRoutes:
    """The handlers for memory."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/models/{modelId}/memory",
                self.get_memory,
                Access.READ,
                "What a model's server needs of memory, part by part, and what it uses now",
                _TAG,
                {200: MemoryAnswer},
                errors=(ModelNotFound, ServiceUnavailable),
            ),
        )

    async def get_memory(self, request: web.Request) -> web.Response:
        """GET /api/models/{modelId}/memory."""
        services = self._services
        model_id = services.registry.model(request.match_info["modelId"]).model_id
        need = estimated = problem = None
        try:
            need = await services.memory.need(model_id)
            estimated = await services.memory.estimated(model_id)
        except NeedUnknown as error:
            problem = str(error)
        used = await services.memory.used(model_id)
        reason = None
        if used is None:
            runs = services.servers.state(model_id) in RUNNING
            reason = "neither its control group nor its process tells" if runs else "it does not run"
        running = await self._running_limits(model_id)
        return answer(
            MemoryAnswer(
                model_id=model_id,
                need=_need_answer(need) if need else None,
                problem=readable(problem) if problem else None,
                estimated=SplitAnswer(host_bytes=estimated.host_bytes, gpu_bytes=estimated.gpu_bytes)
                if estimated
                else None,
                used=UsedMemoryAnswer(
                    host_bytes=used.host_bytes,
                    anonymous_bytes=used.anonymous,
                    mapped_bytes=used.mapped,
                    gpu_bytes=used.gpu,
                    gpu_unavailable=readable(used.gpu_unavailable) if used.gpu_unavailable else None,
                    source=used.source,
                )
                if used
                else None,
                used_unavailable=reason,
                limits=await self._next_limits(model_id, need),
                running_limits=running,
                warnings=self._warnings(model_id, need, running) if need else [],
            )
        )

    async def _next_limits(self, model_id: str, need: MemoryNeed | None) -> MemoryLimitsAnswer:
        """The limits of a server that is started now."""
        services = self._services
        launch = services.preparation.launch_of(services.registry.model(model_id), 0)
        chosen = chosen_limits(launch.runtime_settings)
        names: list[str] = []
        if need is not None and need.gpu_bytes:
            with contextlib.suppress(NeedUnknown):
                names = [device.name for device in (await services.memory.surroundings_of(launch)).devices]
        limits = with_limits(launch, need, services.settings, names).memory_limits or chosen
        return _limits_answer(limits, chosen, limits)

    async def _running_limits(self, model_id: str) -> MemoryLimitsAnswer | None:
        services = self._services
        unit = services.manager.units.get(unit_name(model_id))
        if unit is None or not unit.main_pid:
            return None
        try:
            in_force = MemoryLimits(*await services.manager.memory_limits_of_service(unit.name))
        except BusError:
            return None
        chosen = set_memory_limits_of(unit.environment)
        return _limits_answer(in_force, chosen, memory_limits_of(unit.environment) or chosen)

    def _warnings(self, model_id: str, need: MemoryNeed, running: MemoryLimitsAnswer | None) -> list[str]:
        """What limits are too narrow for: those of the settings, and those that an operator gave to what runs."""
        launch = self._services.preparation.launch_of(self._services.registry.model(model_id), 0)
        at_unit = MemoryLimits(_operators(running.high), _operators(running.max)) if running else MemoryLimits()
        chosen = chosen_limits(launch.runtime_settings)
        return [*warnings_of(need, chosen), *warnings_of(need, at_unit, unit_name(model_id))]


def _operators(limit: MemoryLimitAnswer | None) -> int | None:
    return limit.limit_bytes if limit and limit.source == "operator" else None


def _limits_answer(in_force: MemoryLimits, chosen: MemoryLimits, made_with: MemoryLimits) -> MemoryLimitsAnswer:
    return MemoryLimitsAnswer(
        high=_limit_answer(in_force.high, chosen.high, made_with.high),
        max=_limit_answer(in_force.max, chosen.max, made_with.max),
    )


def _limit_answer(in_force: int | None, chosen: int | None, made_with: int | None) -> MemoryLimitAnswer | None:
    source = source_of(in_force, chosen, made_with)
    return None if in_force is None or source is None else MemoryLimitAnswer(limit_bytes=in_force, source=source)


def _need_answer(need: MemoryNeed) -> MemoryNeedAnswer:
    return MemoryNeedAnswer(
        host_bytes=need.host_bytes,
        gpu_bytes=need.gpu_bytes,
        mapped_bytes=need.mapped,
        basis=need.basis,
        gpu_basis=need.gpu_basis,
        parts=MemoryPartsAnswer(**{name: _split_answer(split) for name, split in need.parts()}),
        context_tokens=need.context,
        context_is_cut=need.context_is_cut,
        slots=need.slots,
        gpu_layers=need.gpu_layers,
        may_grow_by_bytes=need.may_grow,
    )


def _split_answer(split: Split) -> SplitAnswer:
    return SplitAnswer(host_bytes=split.host, gpu_bytes=split.gpu)
