"""The reconciler: the only part that starts and stops servers.

One loop. It looks at what is desired and at the units systemd has, makes a plan (``plan.py``), and carries it out,
each model's step in a task of its own and never two for one model. Whatever changes (a wish, a unit, a connection)
only wakes the loop; what to do is always decided from the whole situation, so a signal that was lost costs time and nothing else.

::

    absent ──start──▶ starting ──exec──▶ loading ──proven──▶ ready ──stop──▶ stopping ──▶ absent
                          ▲                 │ failed, or no progress           │
                          └── cool-down ◀───┴──────────────◀───────────────────┘ failed

What it remembers between two looks (``_Server``) can be found out again: readiness by asking, failure from the unit,
and a cool-down that a restart of the agent cuts short does no harm.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Protocol

import aiohttp

from magi_agent.errors import MagiError
from magi_agent.events import EventStream, ServerChanged
from magi_agent.servers.desired import Desired
from magi_agent.servers.failure import Failure, failure_of
from magi_agent.servers.launch import LaunchSpecification, model_id_of, unit_name
from magi_agent.servers.launcher import Launcher
from magi_agent.servers.llama_server import host_of, port_of
from magi_agent.servers.plan import Plan, Step, UnitCondition, Verb, make_plan
from magi_agent.servers.readiness import Patience, Verdict, wait_until_ready
from magi_agent.systemd.errors import BusDisconnected
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitChange, UnitStatus
from magi_agent.vocabulary import ServerState

_LOG: Final = logging.getLogger(__name__)
_STARTS_AT_ONCE: Final = 4
_LOOK_AGAIN: Final = 30.0
_FIRST_COOLDOWN: Final = 10.0
_LONGEST_COOLDOWN: Final = 300.0
_STEADY: Final = 60.0
"""Seconds a server must have been ready for its earlier failures to be forgotten."""
_LOG_WAIT: Final = 2.0

OUTCOMES: Final = frozenset({ServerState.READY, ServerState.DEGRADED, ServerState.FAILED, ServerState.COOLDOWN})
"""The states in which a start has ended, one way or the other."""


class Preparation(Protocol):
    """What must be settled before a start."""

    async def launch_for(self, model_id: str) -> LaunchSpecification:
        """How a model is to be started now. Raises ``MagiError`` where it cannot be."""


class Evidence(Protocol):
    """What can be found out about a unit that runs, or ran."""

    async def owns_port(self, unit: UnitStatus, port: int) -> bool | None:
        """Whether the unit's own processes listen on the port; ``None`` where nobody can tell."""

    async def progress(self, unit: UnitStatus) -> object:
        """A value that changes while the unit's processes get on."""

    async def last_log_lines(self, unit: UnitStatus) -> tuple[str, ...]:
        """The last lines the unit wrote to the journal. Raises ``MagiError``."""


@dataclass(slots=True)
class _Server:
    state: ServerState = ServerState.STOPPED
    """As it was told to everybody last."""
    proven: tuple[str, int | None] | None = None
    """Invocation and process that were proven ready."""
    ready_since: float | None = None
    failure: Failure | None = None
    recording: bool = False
    """Whether the failure's last log lines are being read; it is told with them."""
    attempts: int = 0
    retry_at: float | None = None
    restart: bool = False
    ending: bool = False
    """Whether the agent itself is ending it, so that its end is nobody else's word."""
    let_go: bool = False
    """Whether somebody else stopped it, and the wish that says so is on its way to disk."""
    step: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    watched: tuple[str, int | None] | None = None

    def was_ready_for(self, now: float) -> float:
        """Seconds since it was proven ready; 0 if it never was."""
        return 0.0 if self.ready_since is None else now - self.ready_since


def condition_of(unit: UnitStatus | None) -> UnitCondition:
    """What matters of a unit for what to do next."""
    if unit is None or unit.load_state == "not-found":
        return UnitCondition.ABSENT
    match unit.active_state:
        case "active" | "activating" | "reloading":
            return UnitCondition.UP
        case "deactivating":
            return UnitCondition.GOING
        case "failed":
            return UnitCondition.FAILED
        case _:
            return UnitCondition.ABSENT


class Reconciler:
    """Brings the servers from what is to what should be."""

    def __init__(
        self,
        manager: SystemdManager,
        launcher: Launcher,
        desired: Desired,
        preparation: Preparation,
        evidence: Evidence,
        events: EventStream,
        patience: Patience,
        stop_timeout: float,
    ) -> None:
        self._manager = manager
        self._launcher = launcher
        self._desired = desired
        self._preparation = preparation
        self._evidence = evidence
        self._events = events
        self._patience = patience
        self._stop_timeout = stop_timeout
        self._servers: dict[str, _Server] = {}
        self._wake = asyncio.Event()
        self._starting = asyncio.Semaphore(_STARTS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._halted = False
        self.last_look = 0.0
        """When the loop last looked, on the event loop's clock; a liveness probe reads it."""

    async def start(self) -> None:
        """Begin to reconcile."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64, force_close=True), auto_decompress=False
        )
        self.look_at_all()
        self._loop_task = self._spawn(self._run(), "reconciler")

    async def stop(self) -> None:
        """Let go of everything; the servers run on."""
        self._halted = True
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session:
            await self._session.close()

    def halt(self) -> None:
        """Start nothing any more: the host is going down."""
        self._halted = True

    def wake(self) -> None:
        """Something changed; look again."""
        self._wake.set()

    def state(self, model_id: str) -> ServerState:
        """The state a model's server is in."""
        server = self._servers.get(model_id)
        return server.state if server else ServerState.STOPPED

    def failure(self, model_id: str) -> Failure | None:
        """Why a model's server failed last, while that matters."""
        server = self._servers.get(model_id)
        return server.failure if server else None

    def retry_in(self, model_id: str) -> float | None:
        """Seconds until a model that failed is tried again."""
        server = self._servers.get(model_id)
        if server is None or server.retry_at is None:
            return None
        return max(0.0, server.retry_at - asyncio.get_running_loop().time())

    def forgive(self, model_id: str) -> None:
        """Forget a model's failures: a person wants it started now."""
        server = self._server(model_id)
        server.failure = None
        server.recording = False
        server.attempts = 0
        server.retry_at = None
        self._announce(model_id)
        self.wake()

    def ask_restart(self, model_id: str) -> None:
        """Replace the running server of a model."""
        self.forgive(model_id)
        self._server(model_id).restart = True
        self.wake()

    def restart_pending(self, model_id: str) -> bool:
        """Whether a restart was asked for and has not begun to start anew."""
        server = self._servers.get(model_id)
        return server is not None and (server.restart or (server.ending and self._desired.wants(model_id)))

    def plan(self, wanted: Mapping[str, bool] | None = None) -> Plan:
        """What would be done now, or if ``wanted`` were desired; nothing is carried out."""
        if wanted is None:
            wanted = {
                model_id: wish.run and not self._server(model_id).let_go
                for model_id, wish in self._desired.wishes.items()
            }
        units = {model_id_of(name): condition_of(unit) for name, unit in self._manager.units.items()}
        return make_plan(
            wanted,
            units,
            restarts={model_id for model_id, server in self._servers.items() if server.restart},
            retry_at={
                model_id: server.retry_at for model_id, server in self._servers.items() if server.retry_at is not None
            },
            now=asyncio.get_running_loop().time(),
        )

    def running(self) -> Collection[str]:
        """The ids of all models that have a unit with processes."""
        return {
            model_id_of(name)
            for name, unit in self._manager.units.items()
            if condition_of(unit) in (UnitCondition.UP, UnitCondition.GOING)
        }

    def unit_changed(self, change: UnitChange) -> None:
        """Take note of what systemd says of one unit."""
        model_id = model_id_of(change.name)
        server = self._server(model_id)
        before, after = condition_of(change.before), condition_of(change.after)
        if after is UnitCondition.UP:
            self._watch_loading(model_id, change.after)
        else:
            self._end_watch(server)
        if after is UnitCondition.FAILED and change.after is not None:
            self._unit_failed(model_id, server, change.after)
        elif after is UnitCondition.ABSENT and before in (UnitCondition.UP, UnitCondition.GOING):
            self._unit_gone(model_id, server)
        self._announce(model_id)
        self.wake()

    def look_at_all(self) -> None:
        """Take all units as they are now: at the start, and after any doubt."""
        for name, unit in list(self._manager.units.items()):
            self.unit_changed(UnitChange(name, None, unit))
        for model_id in {*self._servers, *self._desired.wishes}:
            self._announce(model_id)
        self.wake()

    def _unit_failed(self, model_id: str, server: _Server, unit: UnitStatus) -> None:
        known = server.failure
        if server.ending:
            _LOG.warning("server of %s had to be killed to stop it (%s)", model_id, unit.result)
        elif known is None or known.invocation_id != (unit.invocation_id or None):
            self._count_failure(server, failure_of(unit))
            self._background(self._record_failure(model_id, server, unit), f"failure of {model_id}")

    def _unit_gone(self, model_id: str, server: _Server) -> None:
        """A clean end that the agent did not ask for is somebody's word: it stays stopped."""
        if server.ending or server.let_go or not self._desired.wants(model_id) or self._halted:
            return
        if not self._manager.connected:
            return
        server.let_go = True
        _LOG.info("server of %s was stopped from outside; it stays stopped", model_id)
        self._background(self._respect_stop(model_id), f"stop of {model_id}")

    async def _respect_stop(self, model_id: str) -> None:
        try:
            await self._desired.wish([model_id], run=False, by="systemctl")
        except MagiError as error:
            # It stays stopped for as long as this agent runs; only the next one would not know.
            _LOG.error("%s", error)  # the sentence says it all
            return
        self._server(model_id).let_go = False
        self.wake()

    async def _record_failure(self, model_id: str, server: _Server, unit: UnitStatus) -> None:
        """Tell of a failure once its last words are known."""
        failure = server.failure
        server.recording = True
        try:
            lines = await self._last_lines(unit)
        finally:
            server.recording = False
        if failure is not None and server.failure is failure:
            server.failure = replace(failure, log_lines=lines)
            self._tell_failure(model_id, failure)

    async def _last_lines(self, unit: UnitStatus) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(_LOG_WAIT):
                return await self._evidence.last_log_lines(unit)
        except (MagiError, TimeoutError) as error:
            _LOG.warning("the last log lines of %s could not be read: %s", unit.name, error)
            return ()

    def _fail(self, model_id: str, failure: Failure) -> None:
        self._count_failure(self._server(model_id), failure)
        self._tell_failure(model_id, failure)

    def _count_failure(self, server: _Server, failure: Failure) -> None:
        now = asyncio.get_running_loop().time()
        if server.was_ready_for(now) >= _STEADY:
            server.attempts = 0
        server.ready_since = None
        server.proven = None
        server.failure = failure
        server.attempts += 1
        server.retry_at = now + min(_FIRST_COOLDOWN * 2 ** (server.attempts - 1), _LONGEST_COOLDOWN)

    def _tell_failure(self, model_id: str, failure: Failure) -> None:
        _LOG.error(
            "server of %s failed: %s",
            model_id,
            failure.message,
            extra={"magi_model": model_id, "magi_result": failure.result},
        )
        self._announce(model_id)
        self.wake()

    def _watch_loading(self, model_id: str, unit: UnitStatus | None) -> None:
        server = self._server(model_id)
        if unit is None or unit.active_state != "active" or unit.main_pid is None:
            return
        key = (unit.invocation_id, unit.main_pid)
        if server.proven == key or (server.watched == key and server.watch and not server.watch.done()):
            return
        self._end_watch(server)
        server.watched = key
        server.watch = self._spawn(self._await_readiness(model_id, unit), f"readiness of {model_id}")

    def _end_watch(self, server: _Server) -> None:
        if server.watch is not None and server.watch is not asyncio.current_task():
            server.watch.cancel()
        server.watch = None
        server.watched = None
        server.proven = None

    async def _await_readiness(self, model_id: str, unit: UnitStatus) -> None:
        assert self._session is not None  # noqa: S101  # started before any unit is looked at
        port = port_of(unit.argv)
        if port is None:
            _LOG.warning("%s was started without --port, so nobody can tell whether it is ready", unit.name)
            return
        verdict = await wait_until_ready(
            self._session,
            f"http://{reachable(host_of(unit.argv))}:{port}",
            owns_port=lambda: self._evidence.owns_port(unit, port),
            progress=lambda: self._evidence.progress(unit),
            patience=self._patience,
        )
        server = self._server(model_id)
        if verdict is Verdict.READY:
            server.proven = (unit.invocation_id, unit.main_pid)
            server.ready_since = asyncio.get_running_loop().time()
            server.failure = None
            server.retry_at = None
            _LOG.info("server of %s is ready on port %d", model_id, port, extra={"magi_model": model_id})
            self._announce(model_id)
            return
        server.ending = True
        message = (
            f"it showed no progress for {self._patience.stillness:g} seconds and was not ready"
            if verdict is Verdict.TIMEOUT
            else f"another program answers on its port {port}"
        )
        result = "start-timeout" if verdict is Verdict.TIMEOUT else "port-in-use"
        lines = await self._last_lines(unit)
        self._fail(
            model_id,
            Failure(datetime.now(UTC), result, message, invocation_id=unit.invocation_id or None, log_lines=lines),
        )
        await self._launcher.stop(model_id, self._stop_timeout)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self.last_look = loop.time()
            wake_at = self._step_all() if self._manager.connected else None
            pause = _LOOK_AGAIN if wake_at is None else max(0.0, min(_LOOK_AGAIN, wake_at - loop.time()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    def _step_all(self) -> float | None:
        plan = self.plan()
        for step in plan.steps:
            if self._halted and step.verb is not Verb.STOP:
                continue
            server = self._server(step.model_id)
            if server.step is None or server.step.done():
                server.step = self._spawn(self._carry_out(step), f"{step.verb} of {step.model_id}")
                server.step.add_done_callback(lambda _: self.wake())
                self._announce(step.model_id)
        return plan.wake_at

    async def _carry_out(self, step: Step) -> None:
        server = self._server(step.model_id)
        try:
            match step.verb:
                case Verb.START:
                    await self._start(step.model_id, server)
                case Verb.STOP:
                    await self._stop(step.model_id, server)
                    server.failure = None
                case Verb.RESTART:
                    server.restart = False
                    await self._stop(step.model_id, server)
                case Verb.CLEAR:
                    await self._launcher.clear(step.model_id)
                    server.failure = None
                    server.retry_at = None
        except BusDisconnected as error:
            # Whether it took effect is not known: with the connection comes the whole truth, and a new plan.
            _LOG.warning("%s of %s: %s", step.verb, step.model_id, error)
        except MagiError as error:
            if step.verb is not Verb.START:
                _LOG.error("cannot %s %s: %s", step.verb, step.model_id, error)
                await asyncio.sleep(1)  # the plan asks for the same again at once
            else:
                words = {"PortInUse": "port-in-use", "ModelNotUsable": "not-usable", "NoFreePort": "no-free-port"}
                self._fail(step.model_id, Failure(datetime.now(UTC), words.get(error.error, "start-error"), str(error)))
        finally:
            self._announce(step.model_id)

    async def _start(self, model_id: str, server: _Server) -> None:
        server.restart = False
        server.ending = False
        async with self._starting:
            launch = await self._preparation.launch_for(model_id)
            if await self._manager.is_stopping():
                _LOG.info("the host is going down: %s is not started", model_id)
                self.halt()
                return
            result = await self._launcher.start(launch)
        if not result.ok:
            unit = await self._manager.refresh(unit_name(model_id))
            if condition_of(unit) is UnitCondition.ABSENT:
                message = f"systemd's job to start it ended with {result.value!r}"
                self._fail(model_id, Failure(datetime.now(UTC), "start-error", message))

    async def _stop(self, model_id: str, server: _Server) -> None:
        server.ending = True
        server.failure = None
        server.retry_at = None
        self._end_watch(server)
        await self._launcher.stop(model_id, self._stop_timeout)

    def _announce(self, model_id: str) -> None:
        """Tell everybody, if the state of a model's server is another than they were told."""
        server = self._server(model_id)
        state = self._state_now(model_id, server)
        if state is not None and state is not server.state:
            before, server.state = server.state, state
            self._events.publish(ServerChanged(model_id=model_id, before=before, after=state))

    def _state_now(self, model_id: str, server: _Server) -> ServerState | None:
        """The state as it follows from all that is known; ``None`` while that is not settled."""
        if server.recording:
            return None
        unit = self._manager.units.get(unit_name(model_id))
        wanted = self._desired.wants(model_id) and not server.let_go
        match condition_of(unit):
            case UnitCondition.GOING:
                return ServerState.STOPPING
            case UnitCondition.UP if unit is not None and unit.active_state == "active":
                is_ready = server.proven == (unit.invocation_id, unit.main_pid)
                return ServerState.READY if is_ready else ServerState.LOADING
            case UnitCondition.UP:
                return ServerState.STARTING
            case condition if server.failure is not None:
                if wanted:
                    return ServerState.COOLDOWN
                return ServerState.FAILED if condition is UnitCondition.FAILED else ServerState.STOPPED
            case condition if wanted and not self._halted:
                return ServerState.STARTING
            case condition:
                return ServerState.FAILED if condition is UnitCondition.FAILED else ServerState.STOPPED

    def _server(self, model_id: str) -> _Server:
        return self._servers.setdefault(model_id, _Server())

    def _background(self, work: Awaitable[None], name: str) -> None:
        _ = self._spawn(work, name)  # kept in self._tasks, by which stop() ends it

    def _spawn(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        task = asyncio.ensure_future(_reporting(work, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _reporting(work: Awaitable[None], name: str) -> None:
    try:
        await work
    except MagiError as error:
        _LOG.error("%s: %s", name, error)
    except Exception:
        # The end of the line for a background task: without this nobody would ever hear of it.
        _LOG.exception("%s ended with a defect", name)
        raise


def reachable(host: str | None) -> str:
    """The address at which a server bound to ``host`` is reached from this host, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", None: "127.0.0.1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if host and ":" in host else str(host)
