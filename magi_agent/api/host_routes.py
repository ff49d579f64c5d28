"""The host: what it has, and who uses it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from aiohttp import web

from magi_agent.api.access import require
from magi_agent.api.exchange import CALLER, answer, flag_of
from magi_agent.api.host_schemas import (
    DiskAnswer,
    GpuAnswer,
    HostAnswer,
    MemoryAnswer,
    MemoryLimitAnswer,
    PressureAnswer,
    ProcessorsAnswer,
)
from magi_agent.api.representations import readable
from magi_agent.api.routes import Access, QueryParameter, Route
from magi_agent.api.services import Services
from magi_agent.errors import ValidationFailed
from magi_agent.host.disks import Disk
from magi_agent.host.gpus import Gpu
from magi_agent.host.memory import HostMemory, MemoryLimit
from magi_agent.host.processors import Processors
from magi_agent.host_facts import GpuPicture, HostPicture

_TAG: Final = "host"
_WIRE: Final = {
    "device": "index",
    "pci_address": "pciAddress",
    "memory_total": "memoryTotalBytes",
    "memory_free": "memoryFreeBytes",
    "temperature": "temperatureCelsius",
    "utilization": "utilizationPercent",
    "processes": "models",
}
"""What fields of a GPU are called on the wire, where that is not the same."""
_KERNEL_IS_SILENT: Final = "the kernel does not tell it"
_NEEDS_ARE_SILENT: Final = "a file or a driver does not tell in time what a server needs that is starting, or runs"


class HostRoutes:
    """The handlers for the host."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/host",
                self.get_host,
                Access.READ,
                "What this host has: processors, memory and its limits, GPUs, disks",
                _TAG,
                {200: HostAnswer},
                errors=(ValidationFailed,),
                query=(
                    QueryParameter("binary", "string", "name of the llama-server whose GPUs are meant; else the usual"),
                    QueryParameter("refresh", "boolean", "ask llama-server for its devices again; needs admin access"),
                ),
            ),
        )

    async def get_host(self, request: web.Request) -> web.Response:
        """GET /api/host."""
        refresh = flag_of(request, "refresh")
        if refresh:
            require(request[CALLER], Access.ADMIN)
        settings = self._services.settings
        name = request.query.get("binary")
        binary = settings.binary(name)
        if binary is None:
            known = ", ".join(each for each, _ in settings.llama_server_alternatives) or "none"
            message = f"{name!r} is none of servers.llama_server_alternatives; these are: {known}"
            raise ValidationFailed([{"field": "binary", "message": message}])
        picture = await self._services.host.picture(binary, refresh=refresh)
        # After it: what running servers need may depend on devices, which were perhaps to be asked for anew.
        promised = await self._promised_memory()
        return answer(_host(picture, binary, promised, settings.memory_reserve))

    async def _promised_memory(self) -> int | None:
        try:
            return await self._services.servers.promised_memory()
        except TimeoutError:
            return None


def _host(picture: HostPicture, binary: Path, promised: int | None, reserve: int) -> HostAnswer:
    unavailable = {}
    if picture.systemd_version is None:
        unavailable["systemdVersion"] = "systemd is not reachable"
    if picture.gpus.problem:
        unavailable["devices"] = readable(picture.gpus.problem)
    if picture.gpus.driver_problem:
        unavailable["nvidiaDriver"] = readable(picture.gpus.driver_problem)
    return HostAnswer(
        taken_at=picture.taken_at,
        hostname=picture.hostname,
        kernel=picture.kernel,
        systemd_version=picture.systemd_version,
        booted_at=picture.booted_at,
        uptime_seconds=int(picture.uptime),
        cpu=_processors(picture.processors),
        memory=_memory(picture.memory, promised, reserve),
        gpus=[_gpu(gpu, picture.gpus) for gpu in picture.gpus.gpus],
        llama_server=readable(str(binary)),
        devices_listed_at=picture.gpus.listed_at,
        disks=[_disk(disk) for disk in picture.disks],
        unavailable=unavailable,
    )


def _processors(found: Processors) -> ProcessorsAnswer:
    figures = {"model": found.model, "cores": found.cores, "threads": found.threads, "load": found.load}
    return ProcessorsAnswer(
        model=found.model,
        cores=found.cores,
        threads=found.threads,
        load=list(found.load) if found.load else None,
        unavailable={key: _KERNEL_IS_SILENT for key, value in figures.items() if value is None},
    )


def _memory(memory: HostMemory, promised: int | None, reserve: int) -> MemoryAnswer:
    pressure = memory.pressure
    unavailable = {} if pressure else {"pressure": "the kernel does not count it (CONFIG_PSI, psi=1)"}
    if promised is None:
        unavailable |= dict.fromkeys(("promisedBytes", "roomForStartBytes"), _NEEDS_ARE_SILENT)
    return MemoryAnswer(
        total_bytes=memory.total,
        available_bytes=memory.available,
        swap_total_bytes=memory.swap_total,
        swap_free_bytes=memory.swap_free,
        room_bytes=memory.room,
        promised_bytes=promised,
        reserve_bytes=reserve,
        room_for_start_bytes=None if promised is None else max(0, memory.room - promised - reserve),
        limits=list(_limits(memory.limits, memory.binding)),
        pressure=PressureAnswer(some=list(pressure.some), full=list(pressure.full)) if pressure else None,
        unavailable=unavailable,
    )


def _limits(limits: Iterable[MemoryLimit], binding: MemoryLimit | None) -> Iterable[MemoryLimitAnswer]:
    for limit in limits:
        yield MemoryLimitAnswer(
            control_group=readable(limit.control_group),
            unit=readable(limit.unit),
            high_bytes=limit.high,
            max_bytes=limit.max,
            used_bytes=limit.used,
            room_bytes=limit.room,
            is_binding=limit is binding,
            unavailable={} if limit.used is not None else {"usedBytes": "nothing is in it, or the kernel hides it"},
        )


def _gpu(gpu: Gpu, picture: GpuPicture) -> GpuAnswer:
    users = picture.users.get(gpu.pci_address or "")
    return GpuAnswer(
        index=gpu.device,
        backend=gpu.backend,
        vendor=gpu.vendor,
        name=gpu.name,
        uuid=gpu.uuid,
        pci_address=gpu.pci_address,
        memory_total_bytes=gpu.memory_total,
        memory_free_bytes=gpu.memory_free,
        memory_free_is_live=gpu.is_live,
        temperature_celsius=gpu.temperature,
        utilization_percent=gpu.utilization,
        models=None if gpu.processes is None or users is None else list(users),
        unavailable=_on_wire(gpu.unavailable),
    )


def _on_wire(reasons: Mapping[str, str]) -> dict[str, str]:
    return {_WIRE.get(name, name): readable(reason) for name, reason in reasons.items()}


def _disk(disk: Disk) -> DiskAnswer:
    problem = readable(disk.problem) if disk.problem else None
    return DiskAnswer(
        folder=readable(str(disk.folder)),
        total_bytes=disk.total,
        free_bytes=disk.free,
        unavailable={"totalBytes": problem, "freeBytes": problem} if problem else {},
    )
