"""The composition root: builds the agent's parts, wires them, and knows the order in which they start and stop.

Start: lock the state, load the registry, reach systemd, listen, say READY; then, in the background, take up what is
desired in this boot and the active profile's settings, adopt what runs, scan, resolve the active profile, and want what
the choices ask for. Reload (SIGHUP): read the configuration again, hand each part its share, say READY; then scan,
resolve and want, as at the start. Stop: no new requests, let those under way end, let go of everything; until they have
ended, all that they need goes on. No server is touched by any of them.

Nothing here decides anything but order. A background task that dies ends the agent: systemd starts it anew, and the
models live on.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Collection, Coroutine, MutableMapping, Sequence
from typing import Final

from magi_agent import __version__
from magi_agent.api.application import make_application
from magi_agent.api.listeners import Listeners
from magi_agent.api.services import Services
from magi_agent.configuration import Configuration, ConfigurationSources
from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.scanner import Scanner
from magi_agent.errors import ConfigurationError, MagiError, RescanFailed
from magi_agent.events import ConfigurationReloaded, EventStream, ModelsChanged, ProfilesChanged, ServerChanged
from magi_agent.gateway.idle_stops import IdleStops
from magi_agent.gateway.lanes import Lanes
from magi_agent.gateway.opening import Opening
from magi_agent.gateway.tallies import Tallies
from magi_agent.gateway.tier_models import TierModels
from magi_agent.host.gpus import Gpu
from magi_agent.host_facts import HostFacts
from magi_agent.last_answers import LastAnswers
from magi_agent.launcher.client import DEFAULT_SOCKET, RemoteLauncher
from magi_agent.log_output import set_log_level
from magi_agent.metrics.metrics import Metrics, Sources
from magi_agent.problems import Problems
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.inventory import Inventory
from magi_agent.registry.registry import Registry
from magi_agent.servers.admission import Admission
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.desired import Desired
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.evidence import UnitEvidence
from magi_agent.servers.gpu_use import GpuUse
from magi_agent.servers.history import History
from magi_agent.servers.launch import UNIT_PATTERN
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.servers.limited_launch import LimitedPlacing
from magi_agent.servers.memory_needs import MemoryNeeds
from magi_agent.servers.narrow_limits import NarrowLimits
from magi_agent.servers.offload import Offload
from magi_agent.servers.placements import Placements
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.readiness import Patience
from magi_agent.servers.reconciler import Reconciler
from magi_agent.servers.self_reports import SelfReports
from magi_agent.servers.server_log import ServerLogs
from magi_agent.servers.servers import Servers
from magi_agent.servers.start_order import StartOrder
from magi_agent.servers.states import DOWN, UP
from magi_agent.servers.usage import ServersUsage
from magi_agent.settings.settings import Settings
from magi_agent.state_lock import StateLock
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.journal import Journal
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.notify import Notifier, Watchdog
from magi_agent.transfer import Transfer
from magi_agent.vocabulary import ModelStatus, Scope, ServerState, StartPolicy

_LOG: Final = logging.getLogger(__name__)
_SYSTEMD_WAIT: Final = 5.0
"""Seconds that the start waits for systemd; after that the agent is up without it, and says so."""
_SYSTEMD_RETRY: Final = 0.5
_BINARIES_WAIT: Final = 5.0
"""Seconds that the start waits for the llama-servers to say what they can do."""
_PROFILE_WAIT: Final = 5.0
"""Seconds that the start waits for the active profile's file."""
_FIRST_SCAN_WAIT: Final = 10.0
"""Seconds that what is known from before waits for the first scan: what hangs holds up its own models only."""
_FAILED: Final = frozenset({ServerState.FAILED, ServerState.COOLDOWN})
_OF_ITS_OWN_ACCORD: Final = frozenset({"reloads", "settling anew", "inventory", "idle stops"})
"""Tasks that nobody who waits for an answer waits for."""
_STILL_LOOKING: Final = 120.0
"""Seconds without a look of the reconciler after which the agent is no longer alive; it looks every 30."""


class Agent:
    """One agent: its parts, and its life from start to stop."""

    def __init__(
        self,
        settings: Settings,
        environment: MutableMapping[str, str] | None = None,
        read_settings: Callable[[], Settings] | None = None,
        sources: ConfigurationSources | None = None,
    ) -> None:
        """``environment`` holds what systemd hands over; its variables are taken out once they are used.

        ``read_settings`` reads the settings again for a reload, raising ``ConfigurationError``; ``sources`` say where
        they come from.
        """
        self._configuration = Configuration(settings, read_settings, sources)
        environment = os.environ if environment is None else environment
        self._notifier = Notifier()
        self._lock = StateLock(settings.state_directory)
        self._events = EventStream()
        self._registry = Registry(settings.registry_path, self._events)
        self._profiles = Profiles(settings.profiles_path, self._registry, self._events)
        self._desired = Desired(settings.state_directory / "desired.json")
        self._effective = EffectiveSettings(settings.defaults)
        self._active_profile = ActiveProfile(
            self._profiles, self._registry, self._desired, self._effective, self._events
        )
        self._manager = SystemdManager(
            settings.systemd_scope,
            pattern=UNIT_PATTERN,
            on_change=lambda change: self._reconciler.unit_changed(change),
            on_connection=self._connection_changed,
        )
        self._launcher = _launcher_of(settings, self._manager)
        self._binaries = Binaries(self._launcher, settings.state_directory / "binaries.json")
        self._preparation = StartPreparation(self._registry, settings, self._effective, self._binaries)
        self._connections = ServerConnections()
        journal = Journal(settings.journal_directory)
        self._host = HostFacts(self._manager, self._launcher, self._binaries, settings)
        self._memory = MemoryNeeds(
            self._registry,
            self._preparation,
            self._manager,
            journal,
            self._events,
            settings.state_directory / "memory.json",
            GpuUse(self._host),
            devices=lambda launch: self._placements.devices(launch),
        )
        self._placements = Placements(self._host, self._memory, self._manager)
        self._limited = LimitedPlacing(self._placements, settings)
        self._admission = Admission(
            self._limited,
            self._preparation.launch_as_it_stands,
            lambda max_age: self._host.memory(max_age=max_age),
            settings.memory_reserve,
        )
        order = StartOrder(self._registry, self._effective, self._desired, self._active_profile.place)
        self._reconciler = Reconciler(
            self._manager,
            self._launcher,
            self._desired,
            self._preparation,
            UnitEvidence(self._manager, journal),
            self._connections,
            self._events,
            _patience(settings),
            settings.stop_timeout,
            self._admission,
            order,
            Offload(self._host),
        )
        self._servers = Servers(
            self._manager,
            self._registry,
            self._desired,
            self._reconciler,
            self._preparation,
            self._effective,
            self._events,
            self._admission,
            order,
        )
        self._reports = SelfReports(self._connections, self._servers.ready)
        scanner = Scanner(settings.model_scan_path, _thresholds(settings), settings.state_directory / "headers.json")
        self._inventory = Inventory(scanner, self._registry, self._reconciler.running, settings.rescan_interval)
        self._problems = Problems(
            self._configuration,
            self._registry,
            self._inventory,
            self._profiles,
            self._active_profile,
            self._servers,
            self._manager,
            self._host,
            lambda: self._has_wanted,
        )
        tallies = Tallies(self._registry)
        self._metrics = Metrics(
            Sources(
                configuration=self._configuration,
                registry=self._registry,
                inventory=self._inventory,
                servers=self._servers,
                effective=self._effective,
                manager=self._manager,
                reports=self._reports,
                events=self._events,
                is_settled=lambda: self._has_wanted,
                open_connections=lambda: self._listeners.open_connections,
                room=self._room,
                problems=self._problems,
                tallies=tallies,
                gpus=self._gpus,
            )
        )
        self._lanes = Lanes(
            self._servers,
            self._registry,
            self._effective,
            self._events,
            most_waiting=lambda: self.settings.gateway_queue,
            patience=lambda: self.settings.gateway_timeout,
        )
        self._idle_stops = IdleStops(
            self._servers, self._registry, self._effective, self._events, self._reports, self._lanes
        )
        usage = ServersUsage(self._reports)
        self._tiers = TierModels(
            self._registry, self._effective, self._servers, self._lanes, usage, self._active_profile
        )
        self._opening = Opening(self._servers, self._events)
        self.services = Services(
            configuration=self._configuration,
            registry=self._registry,
            inventory=self._inventory,
            profiles=self._profiles,
            active_profile=self._active_profile,
            servers=self._servers,
            logs=ServerLogs(journal, self._manager),
            history=History(journal, settings.systemd_scope),
            preparation=self._preparation,
            effective=self._effective,
            memory=self._memory,
            narrow_limits=NarrowLimits(self._registry, self._preparation, self._memory, self._effective),
            manager=self._manager,
            transfer=Transfer(self._configuration, self._registry, self._profiles, self._active_profile),
            events=self._events,
            usage=usage,
            reports=self._reports,
            host=self._host,
            metrics=self._metrics,
            problems=self._problems,
            connections=self._connections,
            lanes=self._lanes,
            opening=self._opening,
            tiers=self._tiers,
            tallies=tallies,
            is_settled=lambda: self._has_wanted,
        )
        self._listeners = Listeners(
            make_application(self.services), settings, environment, lambda: bool(self._configuration.tokens)
        )
        self._last_answers = LastAnswers(
            self._listeners, self._lanes, tallies, self._manager, self._notifier, lambda: self.settings.gateway_drain
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._boot: str | None = None
        self._connected = asyncio.Event()
        self._reconciling = False
        self._settled = False
        self._has_wanted = False
        self._reload_asked = asyncio.Event()
        self._reconfigured = asyncio.Event()
        self._end = asyncio.Event()
        self._was_asked_to_end = False
        self._failure: BaseException | None = None

    @property
    def settings(self) -> Settings:
        """The settings that hold now."""
        return self._configuration.settings

    async def start(self) -> None:
        """Come up; when this returns, the API answers and READY is said.

        Raises ``AlreadyRunning`` and ``ConfigurationError``; nothing is left running then.
        """
        await asyncio.to_thread(self._lock.acquire)
        try:
            await self._configuration.read_access()
            await self._registry.load()
            await self._binaries.load()
            await self._memory.load()
            await self._profiles.load()
            self._manager.start()
            try:
                await self._manager.wait_connected(_SYSTEMD_WAIT)
            except BusError as error:
                _LOG.error("%s; nothing can be started until it is reached", error)
            await self._listeners.start()
            self._configuration.note_listeners(
                self._listeners.addresses,
                reached_from_elsewhere=self._listeners.reached_from_elsewhere,
                are_systemds=self._listeners.are_systemds,
            )
        except BaseException:  # whatever it was, nothing may be left running; it goes on its way
            await self.stop()
            raise
        self._settling = self._spawn(self._settle(), "settling")
        _ = self._spawn(self._follow_events(), "events")
        _ = self._spawn(self._follow_reloads(), "reloads")
        _ = self._spawn(self._memory.run(), "memory")
        _ = self._spawn(self._metrics.run(), "metrics")
        _ = self._spawn(self._idle_stops.run(), "idle stops")
        _ = self._spawn(Watchdog(self._notifier, self._liveness).run(), "watchdog")
        self._notifier.ready()
        for problem in self._configuration.problems:
            _LOG.warning("%s", problem)
        _LOG.info("MAGI Agent %s is up on %s", __version__, ", ".join(self._listeners.addresses))

    async def stop(self) -> None:
        """Let go of everything. The servers run on."""
        self._notifier.stopping()
        await self._listeners.stop()
        await self._servers.close()
        await self._reconciler.stop()
        await self._metrics.close()
        await self._lanes.close()
        await self._tiers.close()
        await self._reports.close()
        await self._problems.close()
        self._connections.close()
        await self._host.close()
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._memory.close()
        await self._inventory.close()
        await self._manager.close()
        self._lock.release()

    async def run(self) -> bool:
        """Start, serve until a signal says stop or a part dies, and stop; whether it ended as it should."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end_asked)
        loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        await self.start()
        # What is there then stays. Left out of garbage collections, ten thousand models do not stop the loop for 65 ms.
        self._settling.add_done_callback(lambda _: gc.freeze())
        try:
            await self._end.wait()
        finally:
            _LOG.info("stopping; the servers run on")
            self._notifier.stopping()
            await self._nothing_new()
            await self._last_answers.wait()
            await self.stop()
        return self._failure is None

    async def reload(self) -> None:
        """Read the configuration again and go on by it; one that is bad changes nothing, and is told of."""
        self._notifier.reloading()
        try:
            reload = await self._configuration.reload()
        except ConfigurationError:
            for problem in self._configuration.problems:
                _LOG.error("%s", problem)
        else:
            if reload.changed:
                self._reconfigure()
            _LOG.info("the configuration was reloaded; changed: %s", ", ".join(reload.changed) or "nothing")
            for problem in self._configuration.problems:
                _LOG.warning("%s", problem)
            self._events.publish(
                ConfigurationReloaded(changed=reload.changed, awaiting_restart=reload.awaiting_restart)
            )
            self._reconfigured.set()
        self._notifier.ready(self._status())

    async def _gpus(self) -> Sequence[Gpu]:
        return (await self._host.gpus()).gpus

    async def _room(self) -> int:
        return (await self._host.memory()).room

    def _reconfigure(self) -> None:
        """Hand each part what it needs of the settings. What runs is not touched, and differs from them now, maybe."""
        settings = self.settings
        set_log_level(settings.log_level)
        self._profiles.reconfigure(settings.profiles_path)
        self._effective.hold_defaults(settings.defaults)
        self._launcher.reconfigure(settings.llama_server_user or None)
        self._preparation.reconfigure(settings)
        self._limited.reconfigure(settings)
        self._host.reconfigure(settings)
        self._admission.reconfigure(settings.memory_reserve)
        self._reconciler.reconfigure(_patience(settings), settings.stop_timeout)
        self._inventory.reconfigure(settings.model_scan_path, _thresholds(settings), settings.rescan_interval)

    def _end_asked(self) -> None:
        if self._was_asked_to_end:
            self._last_answers.hurry()
        self._was_asked_to_end = True
        self._end.set()

    async def _nothing_new(self) -> None:
        """End what begins things of its own accord; what requests under way need goes on."""
        ending = [task for task in self._tasks if task.get_name() in _OF_ITS_OWN_ACCORD]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _follow_reloads(self) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()
            await self.reload()

    async def _settle_anew(self) -> None:
        """After each reload, have everything be as a start with the same configuration would leave it."""
        while True:
            await self._reconfigured.wait()
            self._reconfigured.clear()
            await self._ask_binaries()
            _ = await self._host.nvidia_problem()
            await self._rescan(within=_FIRST_SCAN_WAIT)
            await self._active_profile.resolve(self.settings.active_profile)
            await self._want_what_is_chosen()

    def _liveness(self) -> bool | str:
        """Whether the loop turns that the agent is there for; that this is asked at all says that asyncio's does."""
        if not self._reconciling:
            return True
        silence = asyncio.get_running_loop().time() - self._reconciler.last_look
        return silence < _STILL_LOOKING or f"the reconciler has not looked for {silence:.0f} s"

    async def _settle(self) -> None:
        """From "the API answers" to "everything that should run is wanted"."""
        await self._take_up_boot()
        await self._ask_binaries()
        _ = await self._host.nvidia_problem()
        await self._take_up_profile()
        await self._reconciler.start()
        self._reconciling = True
        await self._adopt()
        _ = self._spawn(self._opening.open(self._reconciler.running()), "opening")
        # Without any model known, there is nothing to start before the scan, and no profile to apply to it.
        await self._rescan(within=_FIRST_SCAN_WAIT if self._registry.models else None)
        _ = self._spawn(self._inventory.run(), "inventory")
        await self._active_profile.resolve(self.settings.active_profile)
        self._settled = True
        await self._want_what_is_chosen()
        self._has_wanted = True
        _ = self._spawn(self._settle_anew(), "settling anew")

    async def _ask_binaries(self) -> None:
        """Learn what the llama-servers can do, before anybody asks how what runs differs from what would be started."""
        try:
            async with asyncio.timeout(_BINARIES_WAIT):
                await self._preparation.ask_binaries()
        except TimeoutError:
            _LOG.warning("a llama-server takes long to say what it can do; it is asked again before it is started")

    async def _rescan(self, within: float | None) -> None:
        try:
            await self._inventory.rescan(within)
        except RescanFailed as error:
            _LOG.error("%s", error)

    async def _take_up_boot(self) -> None:
        """Load what is desired in this boot, once systemd can be asked which boot it is."""
        while True:
            await self._connected.wait()
            try:
                boot = await self._manager.boot_id()
            except BusError as error:
                _LOG.warning("%s", error)
                await asyncio.sleep(_SYSTEMD_RETRY)
                continue
            if boot != self._boot:
                await self._desired.load(boot)
                self._boot = boot
            return

    async def _take_up_profile(self) -> None:
        """Have the active profile's settings before the reconciler starts what was wanted before the agent came up."""
        try:
            async with asyncio.timeout(_PROFILE_WAIT):
                await self._active_profile.reload()
        except (MagiError, TimeoutError) as error:
            _LOG.debug("the active profile's settings do not hold yet: %s", error)  # resolving it tells why

    async def _adopt(self) -> None:
        """What runs and nobody spoke about in this boot is wanted: somebody started it, and their word got lost."""
        for name in self._servers.unknown_units():
            _LOG.warning("%s belongs to no model of the registry and is left alone", name)
        unspoken = [
            model_id
            for model_id in self._reconciler.running()
            if model_id in self._registry.models and self._desired[model_id] is None
        ]
        await self._wish(unspoken, by="adoption")
        adopted = [model_id for model_id in self._reconciler.running() if model_id in self._registry.models]
        if adopted:
            _LOG.info("adopted what runs: %s", ", ".join(sorted(adopted)))

    async def _want_what_is_chosen(self, model_ids: Collection[str] | None = None) -> None:
        """Want every enabled model that is to be up whenever the host is, but where somebody spoke in this boot.

        ``model_ids`` are those that it is about, where it is not about all.
        """
        await self._wish(
            [
                model_id
                for model_id, model in self._registry.models.items()
                if (model_ids is None or model_id in model_ids)
                and model.choices.enabled
                and self._effective.start_policy(model) is StartPolicy.ALWAYS_ON
                and self._desired[model_id] is None
            ],
            by="enabled",
        )

    async def _wish(self, model_ids: list[str], *, by: str) -> None:
        if not model_ids:
            return
        try:
            await self._desired.wish(model_ids, run=True, by=by)
        except MagiError as error:
            _LOG.error("%s", error)
        self._reconciler.wake()

    async def _follow_events(self) -> None:
        """Do what one part's change means for another."""
        with self._events.subscribe() as changes:
            self._say_status()
            async for event in changes:
                match event:
                    case ServerChanged(model_id=model_id, after=after):
                        model = self._registry.models.get(model_id)
                        if after in DOWN and model and model.facts.status is ModelStatus.MISSING:
                            self._inventory.look_again()
                        if after in _FAILED:
                            # It may be why, and is in the journal then.
                            _ = await self._host.nvidia_problem()
                    case ModelsChanged(added=added, changed=changed):
                        self._reconciler.retry_with_new_files(filter(self._is_usable, (*added, *changed)))
                        # Until then the profile has not spoken yet, and all are looked at right after it.
                        if added and self._settled:
                            await self._want_what_is_chosen(added)
                    case ProfilesChanged(name=name) if name == self._active_profile.slug:
                        await self._reload_profile()
                    case _:
                        pass
                self._say_status()

    def _is_usable(self, model_id: str) -> bool:
        model = self._registry.models.get(model_id)
        return model is not None and model.facts.status is ModelStatus.OK

    async def _reload_profile(self) -> None:
        try:
            await self._active_profile.reload()
        except MagiError as error:
            _LOG.warning("the active profile could not be read again, its settings stay as they were: %s", error)

    def _say_status(self) -> None:
        self._notifier.status(self._status())

    def _status(self) -> str:
        if self._last_answers.status is not None:
            return self._last_answers.status
        if not self._manager.connected:
            return "systemd is not reachable; trying again"
        states = self._servers.wanted()
        ready = sum(state in UP for state in states.values())
        counts = f"{len(self._registry.models)} models; {ready} of {len(states)} servers ready"
        return "; ".join((counts, *self._configuration.problems))

    def _connection_changed(self, connected: bool) -> None:
        if not connected:
            self._connected.clear()
            self._reconciler.lose_sight()
        else:
            self._connected.set()
            if self._reconciling:
                _ = self._spawn(self._check_boot(), "boot")
        self._say_status()

    async def _check_boot(self) -> None:
        """Find out, after a connection came back, whether it is still the manager whose units we knew."""
        before = self._boot
        await self._take_up_boot()
        await self._reconciler.look_after_absence()
        if self._boot != before:
            _LOG.warning("systemd's manager began anew, and all servers ended with the old one")
            await self._want_what_is_chosen()

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, BusError):
            # The connection went while it was used; it is followed, and everything is looked at again when it is back.
            _LOG.warning("%s: %s", task.get_name(), error)
        elif error is not None:
            _LOG.critical("%s died, and the agent ends with it", task.get_name(), exc_info=error)
            self._failure = error
            self._end.set()


def _launcher_of(settings: Settings, manager: SystemdManager) -> DirectLauncher | RemoteLauncher:
    """Who makes and ends units: the agent itself, or the launcher where the agent may not."""
    path = settings.launcher_socket
    if path is None and settings.systemd_scope is Scope.SYSTEM and os.geteuid() != 0:
        path = DEFAULT_SOCKET
    if path is not None:
        return RemoteLauncher(manager, path)
    return DirectLauncher(manager, settings.state_directory, settings.llama_server_user or None)


def _patience(settings: Settings) -> Patience:
    return Patience(settings.max_startup_time, settings.readiness_check_interval)


def _thresholds(settings: Settings) -> TierThresholds:
    return TierThresholds(settings.powerful_min, settings.fast_max)
