"""The part of an agent that serves models, wired as the composition root wires it, without the API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from magi_agent.discovery.scanner import Scanner
from magi_agent.events import Event, EventStream, ServerChanged
from magi_agent.host.memory import HostMemory
from magi_agent.host_facts import HostFacts
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.admission import Admission
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.desired import Desired
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.evidence import UnitEvidence
from magi_agent.servers.gpu_use import GpuUse
from magi_agent.servers.launch import unit_name
from magi_agent.servers.launcher import DirectLauncher, Launcher
from magi_agent.servers.memory_needs import MemoryNeeds
from magi_agent.servers.pictures import Server
from magi_agent.servers.placements import Placements
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.readiness import Patience
from magi_agent.servers.reconciler import Reconciler
from magi_agent.servers.servers import Servers
from magi_agent.servers.start_order import StartOrder
from magi_agent.settings.settings import Settings
from magi_agent.systemd.journal import Journal
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import Scope, ServerState

PATIENCE_OF_TESTS = 60.0
"""Seconds; what never comes fails the test after that. Generous: the machine may be loaded."""

MakeLauncher = Callable[[SystemdManager, Path], Launcher]
"""Makes a launcher of a manager and the agent's state folder."""

LEGAL_TRANSITIONS: dict[ServerState, set[ServerState]] = {
    ServerState.STOPPED: {
        ServerState.STARTING,
        ServerState.LOADING,
        ServerState.STOPPING,
        ServerState.COOLDOWN,
        ServerState.STUCK,
    },
    ServerState.STARTING: {ServerState.LOADING, ServerState.STOPPING, ServerState.STOPPED, ServerState.COOLDOWN},
    ServerState.LOADING: {
        ServerState.READY,
        ServerState.DEGRADED,
        ServerState.STARTING,
        ServerState.STOPPING,
        ServerState.STOPPED,
        ServerState.COOLDOWN,
    },
    ServerState.DEGRADED: {ServerState.STARTING, ServerState.LOADING, ServerState.STOPPING, ServerState.STOPPED},
    ServerState.READY: {ServerState.STARTING, ServerState.LOADING, ServerState.STOPPING, ServerState.STOPPED},
    # The last two are a stop that was called off before it was carried out.
    ServerState.STOPPING: {
        ServerState.STOPPED,
        ServerState.STARTING,
        ServerState.COOLDOWN,
        ServerState.LOADING,
        ServerState.READY,
        ServerState.STUCK,
    },
    ServerState.STUCK: {ServerState.STARTING, ServerState.STOPPING, ServerState.STOPPED, ServerState.COOLDOWN},
    # On a busy machine a unit may be seen only when its program already runs.
    ServerState.COOLDOWN: {
        ServerState.STARTING,
        ServerState.LOADING,
        ServerState.STOPPED,
        ServerState.STOPPING,
        ServerState.FAILED,
    },
    ServerState.FAILED: {ServerState.STARTING, ServerState.STOPPING, ServerState.STOPPED},
}


class RecordingStream(EventStream):
    """The stream of events, which remembers every change of a server's state."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[ServerChanged] = []

    def publish(self, event: Event) -> None:
        if isinstance(event, ServerChanged):
            self.changes.append(event)
        super().publish(event)


@dataclass(slots=True)
class ServingAgent:
    """Everything from wishes to units, for one folder of models and one folder of state.

    Used as ``async with``; leaving it ends the agent and leaves the servers alone. Several may follow one another on
    the same folders, as an agent does that is started anew.
    """

    models: Path
    state: Path
    settings: Settings
    make_launcher: MakeLauncher = DirectLauncher
    bus_address: str | None = None
    events: RecordingStream = field(default_factory=RecordingStream)
    connections: ServerConnections = field(default_factory=ServerConnections)
    journal: Journal = field(init=False)
    registry: Registry = field(init=False)
    desired: Desired = field(init=False)
    effective: EffectiveSettings = field(init=False)
    manager: SystemdManager = field(init=False)
    launcher: Launcher = field(init=False)
    binaries: Binaries = field(init=False)
    reconciler: Reconciler = field(init=False)
    preparation: StartPreparation = field(init=False)
    servers: Servers = field(init=False)
    memory: MemoryNeeds = field(init=False)
    host: HostFacts = field(init=False)
    admission: Admission = field(init=False)
    order: StartOrder = field(init=False)
    figures: Callable[[], Awaitable[HostMemory]] | None = None
    """What is taken for the host's memory, in place of what it is."""
    started: bool = False
    looking: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.journal = Journal(self.settings.journal_directory)
        self.registry = Registry(self.settings.registry_path, self.events)
        self.desired = Desired(self.state / "desired.json")
        self.effective = EffectiveSettings(self.settings.defaults)
        self.manager = SystemdManager(
            Scope.USER,
            address=self.bus_address,
            on_change=lambda change: self.reconciler.unit_changed(change),
            on_connection=self._connection_changed,
        )
        self.launcher = self.make_launcher(self.manager, self.state)
        self.binaries = Binaries(self.launcher, self.state / "binaries.json")
        self.preparation = StartPreparation(self.registry, self.settings, self.effective, self.binaries)
        self.host = HostFacts(self.manager, self.launcher, self.binaries, self.settings)
        self.memory = MemoryNeeds(
            *(self.registry, self.preparation, self.manager, self.journal, self.events),
            self.state / "memory.json",
            GpuUse(self.host),
        )
        self.admission = Admission(
            Placements(self.host, self.memory, self.manager),
            self.preparation.launch_as_it_stands,
            lambda max_age: self.figures() if self.figures else self.host.memory(max_age=max_age),
            self.settings.memory_reserve,
        )
        self.order = StartOrder(self.registry, self.effective, self.desired, lambda _: None)
        self.reconciler = Reconciler(
            self.manager,
            self.launcher,
            self.desired,
            self.preparation,
            UnitEvidence(self.manager, self.journal),
            self.connections,
            self.events,
            Patience(self.settings.max_startup_time, self.settings.readiness_check_interval),
            self.settings.stop_timeout,
            self.admission,
            self.order,
        )
        self.servers = Servers(
            self.manager,
            self.registry,
            self.desired,
            self.reconciler,
            self.preparation,
            self.effective,
            self.events,
            self.admission,
            self.order,
        )

    def _connection_changed(self, connected: bool) -> None:
        if not connected:
            self.reconciler.lose_sight()
        elif self.started:
            self.looking = asyncio.create_task(self.reconciler.look_after_absence())

    async def __aenter__(self) -> Self:
        self.manager.start()
        await self.registry.load()
        await self.binaries.load()
        await self.scan()
        await self.manager.wait_connected(PATIENCE_OF_TESTS)
        await self.desired.load(await self.manager.boot_id())
        await self.preparation.ask_binaries()
        await self.reconciler.start()
        self.started = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.servers.close()
        await self.reconciler.stop()
        self.connections.close()
        await self.host.close()
        await self.memory.close()
        await self.manager.close()

    async def scan(self) -> None:
        """Bring the registry in step with the model folder."""
        result = await asyncio.to_thread(Scanner([self.models]).scan)
        await self.registry.merge(result.models, self.reconciler.running())

    async def choose(self, model_id: str, settings: RuntimeSettings) -> None:
        """Choose a model's own settings."""
        await self.registry.choose(model_id, lambda choices: replace(choices, runtime_settings=settings))

    def unit(self, model_id: str) -> UnitStatus:
        """The unit of a model's server, which must be there."""
        unit = self.manager.get(unit_name(model_id))
        assert unit is not None, f"{model_id} has no unit"
        return unit

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE_OF_TESTS) -> None:
        """Wait for a condition on this agent."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; went through {self.told()}"
            await asyncio.sleep(0.01)

    async def until_state(self, model_id: str, *states: ServerState, seconds: float = PATIENCE_OF_TESTS) -> Server:
        """Wait until a model's server is in one of these states, and return its picture."""
        await self.until(lambda: self.reconciler.state(model_id) in states, f"{model_id} is {states}", seconds)
        return await self.servers.server(model_id)

    async def ready(self, model_id: str) -> Server:
        """Start a model's server and return it when it is ready."""
        outcome = await self.servers.start(model_id, by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled, f"{model_id} is not ready; went through {self.told(model_id)}"
        return outcome.server

    def told(self, model_id: str | None = None) -> list[str]:
        """The states that were told of, in order, for one model or all."""
        if model_id is None:
            return [f"{event.model_id}: {event.before} -> {event.after}" for event in self.events.changes]
        events = [event for event in self.events.changes if event.model_id == model_id]
        return [str(event.after) for event in events]

    def check_transitions(self) -> None:
        """Each state follows from the one told before, by a legal step."""
        now: dict[str, ServerState] = {}
        for event in self.events.changes:
            assert event.before is now.get(event.model_id, ServerState.STOPPED), self.told()
            assert event.after in LEGAL_TRANSITIONS[event.before], f"{event.before} -> {event.after}: {self.told()}"
            now[event.model_id] = event.after
        for model_id, state in now.items():
            assert self.reconciler.state(model_id) is state
