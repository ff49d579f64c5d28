"""The figures of one scrape: asked for at once, kept for a second, and made into text in a thread.

Several scrapers cost one look. What is asked for grows with what is told: the servers that run, and not the models that
there are.
"""

import asyncio
import os
import platform
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import psutil

from magi_agent import __version__
from magi_agent.configuration import Configuration
from magi_agent.errors import MagiError, ServiceUnavailable
from magi_agent.events import EventStream
from magi_agent.gateway.tallies import Tallies
from magi_agent.host.unified_hierarchy import unified_hierarchy
from magi_agent.metrics.event_counts import EventCounts
from magi_agent.metrics.forms import Form
from magi_agent.metrics.loop_lag import LoopLag
from magi_agent.metrics.request_counts import RequestCounts
from magi_agent.metrics.server_scrapes import ServerScrapes
from magi_agent.metrics.snapshot import (
    AgentFigures,
    GpuFigures,
    HostFigures,
    ModelFigures,
    ServerFigures,
    Snapshot,
)
from magi_agent.metrics.unit_usage import UnitUsage, read_usage
from magi_agent.problems import Problems
from magi_agent.readiness import readiness
from magi_agent.registry.inventory import Inventory
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.launch import unit_name
from magi_agent.servers.plan import UnitCondition, condition_of
from magi_agent.servers.self_reports import SelfReports
from magi_agent.servers.servers import Servers
from magi_agent.servers.states import UP
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus

GpuSource = Callable[[], Awaitable[Sequence[GpuFigures]]]
RoomSource = Callable[[], Awaitable[int]]
_FRESH: Final = 1.0
"""Seconds that a look is told to whoever asks."""
_PATIENCE: Final = 2.0
"""Seconds that systemd and the GPUs' drivers have to answer."""
_AT_ONCE: Final = 8
_NANOSECONDS: Final = 1e9


@dataclass(slots=True)
class _Look:
    """What was seen, and the texts that were made of it."""

    snapshot: Snapshot
    at: float
    texts: dict[Form, asyncio.Future[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sources:
    """The parts that are asked."""

    configuration: Configuration
    registry: Registry
    inventory: Inventory
    servers: Servers
    effective: EffectiveSettings
    manager: SystemdManager
    reports: SelfReports
    events: EventStream
    is_settled: Callable[[], bool]
    open_connections: Callable[[], int]
    """How many there are to the API."""
    room: RoomSource
    """Bytes of memory that servers may still take."""
    problems: Problems
    tallies: Tallies
    gpus: GpuSource | None = None
    """``None`` where nobody knows of GPUs."""


class Metrics:
    """Counts what happens, and looks at the rest when somebody asks."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._scrapes = ServerScrapes(sources.reports)
        self._events = EventCounts(sources.events, sources.servers)
        self._lag = LoopLag()
        self._look: asyncio.Task[_Look] | None = None
        self._model_counts: tuple[int, Mapping[tuple[str, bool], int]] = (-1, {})
        self.requests = RequestCounts()

    async def run(self) -> None:
        """Count what happens, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._events.run(), name="metrics of events")
            tasks.create_task(self._lag.run(), name="metrics of the loop")

    async def close(self) -> None:
        """End a look that is under way."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)

    async def text(self, form: Form) -> bytes:
        """Everything, as of at most a second ago."""
        look = await self._looked()
        if form not in look.texts:
            look.texts[form] = asyncio.ensure_future(asyncio.to_thread(_text, look.snapshot, form))
        return await asyncio.shield(look.texts[form])

    async def _looked(self) -> _Look:
        task = self._look
        if task is None or (task.done() and (_failed(task) or _now() - task.result().at > _FRESH)):
            task = self._look = asyncio.create_task(self._take(), name="metrics")
        # Whoever leaves does not take the look away from the others.
        return await asyncio.shield(task)

    async def _take(self) -> _Look:
        began = _now()
        host, gpus, servers, problems = await asyncio.gather(
            self._host(), self._gpus(), self._servers(), self._sources.problems.known()
        )
        now = _now()
        tallies = self._sources.tallies.taken()
        return _Look(
            Snapshot(self._agent(len(problems)), host, gpus, self._models(), servers, tallies, now - began), now
        )

    def _agent(self, problems: int) -> AgentFigures:
        sources = self._sources
        found = readiness(
            sources.registry, sources.servers, sources.effective, sources.manager, sources.is_settled
        )  # fmt: skip
        return AgentFigures(
            version=__version__,
            python=platform.python_version(),
            scope=sources.configuration.settings.systemd_scope,
            is_ready=found.is_ready,
            is_settled=found.is_settled,
            is_connected=found.is_connected,
            is_draining=sources.servers.drain is not None,
            problems=problems,
            requests=self.requests.taken(),
            requests_under_way=self.requests.under_way,
            connections=sources.open_connections(),
            tasks=len(asyncio.all_tasks()),
            lag=self._lag.taken(),
            events=self._events.taken(),
            operations_under_way=sources.servers.operations.under_way,
        )

    def _models(self) -> ModelFigures | None:
        registry, inventory = self._sources.registry, self._sources.inventory
        if self._model_counts[0] != registry.revision:
            try:
                models = registry.models
            except ServiceUnavailable:
                return None
            counts = Counter((model.facts.status.value, model.choices.enabled) for model in models.values())
            self._model_counts = (registry.revision, counts)
        return ModelFigures(
            counts=self._model_counts[1],
            scans_succeeded=inventory.scans.succeeded,
            scans_failed=inventory.scans.failed,
            scan_seconds=inventory.scans.last_seconds,
            scanned_at=registry.last_scan.timestamp() if registry.last_scan else None,
            problems=inventory.problem_count,
        )

    async def _host(self) -> HostFigures:
        room = await self._room()
        return await asyncio.to_thread(_host, room)

    async def _room(self) -> int | None:
        if not self._sources.manager.connected:
            # Which limits hold for the servers, systemd knows.
            return None
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._sources.room()
        except (MagiError, TimeoutError, OSError):
            return None

    async def _gpus(self) -> Sequence[GpuFigures] | None:
        if self._sources.gpus is None:
            return ()
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._sources.gpus()
        except (MagiError, TimeoutError, OSError):
            return None

    async def _servers(self) -> list[ServerFigures]:
        sources = self._sources
        try:
            models = sources.servers.listed()
        except ServiceUnavailable:
            return []
        units = {model.model_id: sources.manager.units.get(unit_name(model.model_id)) for model in models}
        states = {model.model_id: sources.servers.state(model.model_id) for model in models}
        running = {
            model_id: unit
            for model_id, unit in units.items()
            if unit is not None and condition_of(unit) in (UnitCondition.UP, UnitCondition.GOING)
        }
        usages, scrapes = await asyncio.gather(self._usages(running), self._scrapes.all())
        return [
            ServerFigures(
                model=model,
                state=states[model.model_id],
                is_wanted=sources.servers.is_wanted(model.model_id),
                start_policy=sources.effective.start_policy(model),
                unit_name=unit_name(model.model_id),
                unit=units[model.model_id],
                usage=usages.get(model.model_id),
                scrape=scrapes.get(model.model_id) if states[model.model_id] in UP else None,
            )
            for model in models
        ]

    async def _usages(self, running: Mapping[str, UnitStatus]) -> dict[str, UnitUsage]:
        """What the units use: by the files of their control groups, else by systemd, else by the main process."""
        usages = await asyncio.to_thread(_of_control_groups, running)
        gate = asyncio.Semaphore(_AT_ONCE)
        unknown = [model_id for model_id, usage in usages.items() if _is_unknown(usage)]
        asked = await asyncio.gather(*(self._of_systemd(running[each], usages[each], gate) for each in unknown))
        usages |= dict(zip(unknown, asked, strict=True))
        if any(_is_unknown(usage) for usage in usages.values()):
            usages = await asyncio.to_thread(_of_processes, running, usages)
        return usages

    async def _of_systemd(self, unit: UnitStatus, usage: UnitUsage, gate: asyncio.Semaphore) -> UnitUsage:
        try:
            async with asyncio.timeout(_PATIENCE), gate:
                found = await self._sources.manager.read_accounting(unit.name)
        except (BusError, TimeoutError):
            return usage
        cpu = None if found.cpu_usage_nsec is None else found.cpu_usage_nsec / _NANOSECONDS
        return replace(
            usage,
            memory=found.memory_current if usage.memory is None else usage.memory,
            cpu_seconds=cpu if usage.cpu_seconds is None else usage.cpu_seconds,
            tasks=found.tasks_current if usage.tasks is None else usage.tasks,
        )


def _text(snapshot: Snapshot, form: Form) -> bytes:
    # Imported by the first scrape, and in its thread: that takes a while.
    from magi_agent.metrics.exposition import rendered
    from magi_agent.metrics.families import families

    return rendered(families(snapshot), form)


def _host(room: int | None) -> HostFigures:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return HostFigures(
        memory.total, memory.available, room, swap.total, swap.free, os.getloadavg(), os.cpu_count() or 1
    )  # fmt: skip


def _of_control_groups(running: Mapping[str, UnitStatus]) -> dict[str, UnitUsage]:
    hierarchy = unified_hierarchy()
    folders = {
        model_id: hierarchy.folder_of(unit.control_group) if hierarchy and unit.control_group else None
        for model_id, unit in running.items()
    }
    return {model_id: read_usage(folder) if folder else UnitUsage() for model_id, folder in folders.items()}


def _of_processes(running: Mapping[str, UnitStatus], usages: Mapping[str, UnitUsage]) -> dict[str, UnitUsage]:
    """What is still not known, of the main processes: as far as this user may know it."""
    return {model_id: _of_process(running[model_id].main_pid, usage) for model_id, usage in usages.items()}


def _of_process(pid: int | None, usage: UnitUsage) -> UnitUsage:
    if pid is None or not _is_unknown(usage):
        return usage
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        resident = process.memory_info().rss
    except psutil.Error:
        return usage
    return replace(
        usage,
        memory=resident if usage.memory is None else usage.memory,
        cpu_seconds=times.user + times.system if usage.cpu_seconds is None else usage.cpu_seconds,
    )


def _is_unknown(usage: UnitUsage) -> bool:
    return usage.memory is None or usage.cpu_seconds is None


def _failed(task: "asyncio.Task[_Look]") -> bool:
    return task.cancelled() or task.exception() is not None


def _now() -> float:
    return asyncio.get_running_loop().time()
