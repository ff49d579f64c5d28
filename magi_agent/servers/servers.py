"""The servers as the API sees them: each one's picture, and the verbs that change what is desired.

Nothing here starts or stops anything. A verb writes a wish and wakes the reconciler; who wants the outcome waits for
the events that tell of it.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from magi_agent.errors import Draining, InsufficientMemory, SettingsNotUsable, StartFailed, StopFailed
from magi_agent.events import DrainChanged, EventStream
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.admission import Admission
from magi_agent.servers.desired import Desired, Drain
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.failure import INSUFFICIENT_MEMORY, Failure
from magi_agent.servers.launch import model_id_of, unit_name
from magi_agent.servers.llama_server import differences, port_of, reach_of
from magi_agent.servers.operations import Operation, Operations, OperationStatus
from magi_agent.servers.pictures import Pictures, Server
from magi_agent.servers.plan import UnitCondition, condition_of
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.reach import Reach
from magi_agent.servers.reconciler import OUTCOMES, Reconciler
from magi_agent.servers.self_reports import ReadyServer
from magi_agent.servers.settings_faults import settings_not_usable
from magi_agent.servers.shortage import insufficient_memory
from magi_agent.servers.start_order import StartOrder
from magi_agent.servers.states import DOWN, RUNNING, UP
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerState, StartPolicy

_LOG: Final = logging.getLogger(__name__)
_Accept = Callable[[ServerState], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb on one model came to."""

    message: str
    changed: bool
    """Whether anything had to be done."""
    settled: bool
    """Whether it is done already."""
    server: Server


class Servers:
    """Every model's server."""

    def __init__(
        self,
        manager: SystemdManager,
        registry: Registry,
        desired: Desired,
        reconciler: Reconciler,
        preparation: StartPreparation,
        effective: EffectiveSettings,
        events: EventStream,
        admission: Admission,
        order: StartOrder,
    ) -> None:
        self._manager = manager
        self._registry = registry
        self._desired = desired
        self._reconciler = reconciler
        self._preparation = preparation
        self._effective = effective
        self._events = events
        self._admission = admission
        self._order = order
        self._pictures = Pictures(manager, reconciler, preparation)
        self.operations = Operations(events)
        """What was begun on several models."""

    async def close(self) -> None:
        """End the operations that are under way; what they wished for stays wished for."""
        await self.operations.close()

    async def list(self) -> list[Server]:
        """Every model that should run or has a loaded unit, by id."""
        known = self.listed()
        await self._preparation.look_at_binaries()
        return list(await asyncio.gather(*(self._pictures.of(model) for model in known)))

    def listed(self) -> tuple[Model, ...]:
        """The models of ``list``. Raises ``ServiceUnavailable`` before the registry is loaded."""
        ids = {model_id for model_id, wish in self._desired.wishes.items() if wish.run}
        ids |= {model_id_of(name) for name, unit in self._manager.units.items() if unit.load_state != "not-found"}
        return tuple(self._registry.models[model_id] for model_id in sorted(ids) if model_id in self._registry.models)

    async def server(self, model_id: str) -> Server:
        """One model's server, running or not. Raises ``ModelNotFound``."""
        model = self._registry.model(model_id)
        await self._preparation.look_at_binaries()
        return await self._pictures.of(model)

    def state(self, model_id: str) -> ServerState:
        """The state a model's server is in; that of a model nobody knows is ``stopped``."""
        return self._reconciler.state(model_id)

    def ready(self) -> dict[str, ReadyServer]:
        """The servers that are ready, by their models' ids."""
        units = ((model_id_of(name), unit) for name, unit in self._manager.units.items())
        return {
            model_id: ReadyServer(reach, unit.invocation_id)
            for model_id, unit in units
            if self._reconciler.state(model_id) in UP and (reach := reach_of(unit.argv, unit.environment))
        }

    def reach_if_ready(self, model_id: str) -> Reach | None:
        """Where a model's server is, if it answers."""
        unit = self._manager.units.get(unit_name(model_id))
        if unit is None or self._reconciler.state(model_id) not in UP:
            return None
        return reach_of(unit.argv, unit.environment)

    def failure(self, model_id: str) -> Failure | None:
        """Why a model's server failed last, while that matters."""
        return self._reconciler.failure(model_id)

    def is_wanted(self, model_id: str) -> bool:
        """Whether a model's server should run."""
        return self._reconciler.wants(model_id)

    def unknown_units(self) -> Collection[str]:
        """Units of ours, by name, that belong to no model the registry knows; they are left alone."""
        return sorted(name for name in self._manager.units if model_id_of(name) not in self._registry.models)

    def wanted(self) -> dict[str, ServerState]:
        """The state of each model that should run, and that there is: one that went is no longer waited for."""
        return {
            model_id: self._reconciler.state(model_id)
            for model_id, wish in self._desired.wishes.items()
            if wish.run and model_id in self._registry.models
        }

    @property
    def drain(self) -> Drain | None:
        """Who drains the host, if somebody does."""
        return self._desired.drain

    async def set_drain(self, draining: bool, *, by: str) -> None:
        """Begin or end the drain: nothing is started while it lasts, and what runs goes on.

        Raises ``RegistrySaveFailed``, ``ServiceUnavailable``.
        """
        before = self._desired.drain
        await self._desired.set_drain(draining, by=by)
        if (before is None) is draining:
            self._events.publish(DrainChanged(draining=draining, by=by))
        _LOG.info("%s by %s", "the host is being drained" if draining else "the drain is taken back", by)

    def differs_from_choice(self, model: Model) -> bool:
        """Whether what runs now is other than what ``enabled`` says."""
        runs = self._reconciler.state(model.model_id) in RUNNING - {ServerState.STOPPING}
        if not model.choices.enabled:
            return runs
        return not runs and self._effective.start_policy(model) is StartPolicy.ALWAYS_ON

    async def start(self, model_id: str, *, by: str, wait: float = 0.0, forced: bool = False) -> Outcome:
        """Want a model's server to run; wait up to ``wait`` seconds until it is ready.

        With ``forced`` it is started also where it does not fit into memory.

        Raises ``ModelNotFound``, ``ModelNotUsable``, ``SettingsNotUsable``, ``InsufficientMemory``, ``NoFreePort``,
        ``Draining``, ``RegistrySaveFailed`` and, if the wait saw it fail, ``StartFailed``.
        """
        model_id = self._registry.model(model_id).model_id
        if self._is_up(model_id):
            return await self._outcome(model_id, f"Model {model_id} is running already", changed=False, settled=True)
        changed = not (self._reconciler.wants(model_id) and self._reconciler.state(model_id) in RUNNING)
        done = await self.bring_up(model_id, by=by, wait=wait, forced=forced)
        message = f"Model {model_id} is ready" if done else f"Model {model_id} is starting"
        return await self._outcome(model_id, message, changed=changed, settled=done)

    async def bring_up(self, model_id: str, *, by: str, wait: float = 0.0, forced: bool = False) -> bool:
        """Do as ``start`` does, and say only whether the server is up: at once, where the answer is waited for."""
        model = self._registry.model(model_id)
        model_id = model.model_id
        if self._is_up(model_id):
            return True
        self.refuse_while_draining()
        await self._preparation.check(model)
        if not (self._reconciler.wants(model_id) and self._reconciler.state(model_id) in RUNNING):
            await self._check_memory(model_id, forced=forced)
        if model.choices.port is None:
            await self._preparation.give_port(model_id)
        async with self._following(model_id) as settled:
            await self._desired.wish([model_id], run=True, by=by, forced=forced, named=True)
            self._reconciler.forgive(model_id)
            done = await settled(lambda state: state in OUTCOMES or not self._reconciler.wants(model_id), wait)
        if done and self._reconciler.state(model_id) not in UP:
            raise self._start_failed(model_id)
        return done

    def _is_up(self, model_id: str) -> bool:
        return self._reconciler.state(model_id) in UP and self._reconciler.wants(model_id)

    async def stop(self, model_id: str, *, by: str, wait: float = 0.0) -> Outcome:
        """Want a model's server stopped; wait up to ``wait`` seconds until it is.

        Raises ``ModelNotFound``, ``RegistrySaveFailed`` and, if the wait saw that nobody could, ``StopFailed``.
        """
        model_id = self._registry.model(model_id).model_id
        if self._is_down(model_id) and not self._reconciler.wants(model_id):
            return await self._outcome(model_id, f"Model {model_id} is stopped already", changed=False, settled=True)
        async with self._following(model_id) as settled:
            await self._desired.wish([model_id], run=False, by=by)
            self._reconciler.forgive(model_id)
            await self._stopped(model_id, settled, wait)
        done = self._is_down(model_id) and not self._reconciler.wants(model_id)
        message = f"Model {model_id} is stopped" if done else f"Model {model_id} is stopping"
        if self._reconciler.wants(model_id):
            message = f"Model {model_id} is to run again: somebody said so meanwhile"
        return await self._outcome(model_id, message, changed=True, settled=done)

    async def _check_memory(self, model_id: str, *, forced: bool, running: UnitStatus | None = None) -> None:
        """See that a start is not refused for memory, unless somebody forced it. Raises ``InsufficientMemory``."""
        wish = self._desired[model_id]
        if forced or (wish is not None and wish.is_forced and self._reconciler.wants(model_id)):
            return
        if launch := self._preparation.launch_as_it_stands(model_id):
            await self._admission.check(launch, running)

    async def restart(
        self, model_id: str, *, by: str, wait: float = 0.0, forced: bool = False, named: bool = True
    ) -> Outcome:
        """Replace a model's running server by a new one; start it where none runs. As ``start`` otherwise.

        What the running one uses counts as free. ``named`` is whether somebody asked for this very model.
        """
        model_id = self._registry.model(model_id).model_id
        # The unit is asked: a state is known only once an agent that has just come up has looked at what runs.
        unit = self._manager.units.get(unit_name(model_id))
        if condition_of(unit) is not UnitCondition.UP:
            return await self.start(model_id, by=by, wait=wait, forced=forced)
        self.refuse_while_draining()
        await self._preparation.check_replacement(self._registry.model(model_id))
        await self._check_memory(model_id, forced=forced, running=unit)
        async with self._following(model_id) as settled:
            await self._desired.wish([model_id], run=True, by=by, forced=forced, named=named)
            self._reconciler.ask_restart(model_id)
            done = await settled(
                lambda state: (
                    (state in OUTCOMES and not self._reconciler.restart_pending(model_id))
                    or not self._reconciler.wants(model_id)
                    or self._reconciler.trouble(model_id) is not None
                ),
                wait,
            )
        if wait and (self._reconciler.restart_pending(model_id) or self.state(model_id) is ServerState.STUCK):
            self._raise_trouble(model_id)
        if done and self._reconciler.state(model_id) not in UP:
            raise self._start_failed(model_id)
        message = f"Model {model_id} is ready again" if done else f"Model {model_id} is restarting"
        return await self._outcome(model_id, message, changed=True, settled=done)

    def start_all(self, *, by: str) -> Operation:
        """Want every enabled model to run, the most wanted first. Raises ``Draining``."""
        self.refuse_while_draining()
        ids = [model_id for model_id, model in self._registry.models.items() if model.choices.enabled]
        operation = Operation.on("start-all", self._order.ordered(ids))
        return self.operations.begin(operation, self._start_together(operation, by))

    async def _start_together(self, operation: Operation, by: str) -> None:
        """Want all models that can be started at once, so that none is admitted before a more wanted one is known."""

        async def prepared(model_id: str) -> Model:
            await self._preparation.check(self._registry.model(model_id))
            return await self._preparation.give_port(model_id)

        await asyncio.gather(*(operation.attempt(each, prepared(each)) for each in operation.parts))
        able = [each for each, part in operation.parts.items() if part.status is OperationStatus.PENDING]
        running = {each for each in able if self._reconciler.state(each) in UP and self._reconciler.wants(each)}
        due = [each for each in able if each not in running]
        wished = asyncio.ensure_future(self._desired.wish(due, run=True, by=by))
        await asyncio.wait({wished})
        for model_id in due:
            self._reconciler.forgive(model_id)

        async def come_about(model_id: str, wait: float) -> Outcome:
            if model_id in running:
                message = f"Model {model_id} is running already"
                return await self._outcome(model_id, message, changed=False, settled=True)
            await wished
            return await self._come_about(model_id, True, wait)

        await operation.all_at_once(come_about, able)

    def stop_all(self, *, by: str) -> Operation:
        """Want no model to run."""
        ids = {model_id for model_id, wish in self._desired.wishes.items() if wish.run} | set(
            self._reconciler.running()
        )
        known = sorted(model_id for model_id in ids if model_id in self._registry.models)
        operation = Operation.on("stop-all", known)
        return self.operations.begin(
            operation, operation.all_at_once(lambda model_id, wait: self.stop(model_id, by=by, wait=wait))
        )

    async def restart_changed(self, *, by: str) -> Operation:
        """Replace each running server that differs from how it would be started now.

        One after the other, those that serve until their turn comes; after the first that fails the rest is left as it
        runs. Raises ``Draining``.
        """
        self.refuse_while_draining()
        changed = [
            server.model_id
            for server in await self.list()
            if server.restart_reasons and self._reconciler.wants(server.model_id)
        ]
        operation = Operation.on("restart-changed", changed)
        return self.operations.begin(
            operation, operation.one_by_one(lambda model_id, wait: self._restart_if_due(model_id, by, wait))
        )

    async def _restart_if_due(self, model_id: str, by: str, wait: float) -> Outcome:
        """Restart a model whose turn has come, unless somebody stopped or restarted it before that."""
        server = await self.server(model_id)
        if not self._reconciler.wants(model_id):
            return Outcome(f"Model {model_id} was stopped meanwhile, and stays so", False, True, server)
        if not server.restart_reasons:
            return Outcome(f"Model {model_id} runs as it should already", False, True, server)
        return await self.restart(model_id, by=by, wait=wait, named=False)

    def changed_by(self, effective: EffectiveSettings, model_ids: Iterable[str]) -> tuple[str, ...]:
        """Which of some models run with other settings than those of ``effective``."""
        changed = []
        for model_id in model_ids:
            model, unit = self._registry.models.get(model_id), self._manager.units.get(unit_name(model_id))
            if model and unit and condition_of(unit) is UnitCondition.UP:
                port = model.choices.port or port_of(unit.argv) or 0
                launch = self._preparation.launch_of(model, port, effective)
                if differences(launch, unit.argv, unit.environment):
                    changed.append(model_id)
        return tuple(changed)

    async def not_fitting(
        self, runs: Mapping[str, bool], effective: EffectiveSettings, places: Mapping[str, int]
    ) -> dict[str, InsufficientMemory]:
        """Which of some models would not fit into memory if they were started and others stopped, and why.

        ``effective`` are the settings that would hold, and ``places`` where models would stand in the active profile.
        """
        starts = self._order.under(effective, places).ordered(model_id for model_id, run in runs.items() if run)
        launches = [self._preparation.launch_as_it_stands(model_id, effective) for model_id in starts]
        stopped = [self._manager.units.get(unit_name(model_id)) for model_id, run in runs.items() if not run]
        leaving = [unit for unit in stopped if unit is not None and condition_of(unit) is UnitCondition.UP]
        found = await self._admission.not_fitting([launch for launch in launches if launch], leaving)
        return {model_id: insufficient_memory(model_id, shortage) for model_id, shortage in found.items()}

    async def promised_memory(self) -> int:
        """What servers that are starting, or run, will take yet of the host's memory. Raises ``TimeoutError``."""
        return await self._admission.promised()

    async def not_runnable(
        self, model_ids: Iterable[str], effective: EffectiveSettings
    ) -> dict[str, SettingsNotUsable]:
        """Which of some models could not be run with the settings of ``effective``, and why."""
        found = {}
        for model_id in model_ids:
            model = self._registry.models.get(model_id)
            if model is not None and (faults := await self._preparation.faults_of(effective.of(model))):
                found[model_id] = settings_not_usable(model_id, faults)
        return found

    def follow(self, kind: str, runs: Mapping[str, bool]) -> Operation:
        """An operation for wishes that were made already: it ends when each model runs, or does not, as it says.

        What a model failed with before is forgotten: one that is to run is tried again at once.
        """
        for model_id in runs:
            self._reconciler.forgive(model_id)
        operation = Operation.on(kind, runs)
        return self.operations.begin(
            operation,
            operation.all_at_once(lambda model_id, wait: self._come_about(model_id, runs[model_id], wait)),
        )

    async def _come_about(self, model_id: str, run: bool, wait: float) -> Outcome:
        async with self._following(model_id) as settled:
            if run:
                await settled(lambda state: state in OUTCOMES or not self._reconciler.wants(model_id), wait)
                if self._reconciler.state(model_id) not in UP:
                    raise self._start_failed(model_id)
                return await self._outcome(model_id, f"Model {model_id} is ready", changed=True, settled=True)
            await self._stopped(model_id, settled, wait)
        done = self._is_down(model_id)
        message = f"Model {model_id} is stopped" if done else f"Model {model_id} is stopping"
        return await self._outcome(model_id, message, changed=True, settled=done)

    def refuse_while_draining(self) -> None:
        """Raise ``Draining`` while nothing is to be started."""
        if drain := self._desired.drain:
            raise Draining(drain.by)

    async def _stopped(self, model_id: str, settled: Callable[[_Accept, float], Awaitable[bool]], wait: float) -> None:
        """Wait for the end of a stop, and raise ``StopFailed`` where nobody can bring it about for now."""

        def is_over(_: ServerState) -> bool:
            return (
                self._is_down(model_id)
                or self._reconciler.wants(model_id)
                or self._reconciler.trouble(model_id) is not None
            )

        await settled(is_over, wait)
        if wait and not (self._is_down(model_id) or self._reconciler.wants(model_id)):
            self._raise_trouble(model_id)

    def _raise_trouble(self, model_id: str) -> None:
        if trouble := self._reconciler.trouble(model_id):
            raise _stop_failed(model_id, trouble)

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot be done about servers for now, and what those that are degraded do without, in sentences."""
        troubles = tuple(
            f"server of {model_id}: {each.message}" for model_id, each in self._reconciler.troubles.items()
        )
        return (
            *troubles,
            *(f"server of {name} is degraded: {it.message}" for name, it in self._reconciler.lacks.items()),
        )

    def _is_down(self, model_id: str) -> bool:
        unit = self._manager.units.get(unit_name(model_id))
        return self._reconciler.state(model_id) in DOWN and condition_of(unit) is UnitCondition.ABSENT

    def _start_failed(self, model_id: str) -> StartFailed | StopFailed | InsufficientMemory:
        failure = self._reconciler.failure(model_id)
        if failure and self._reconciler.state(model_id) is ServerState.STUCK:
            return _stop_failed(model_id, failure)
        if failure is None:
            return StartFailed(f"model {model_id} was stopped before it was ready", {"modelId": model_id})
        error = self._start_error(model_id, failure)
        if (left := self._reconciler.retry_in(model_id)) is not None:
            error.retry_after = math.ceil(left)
        return error

    @staticmethod
    def _start_error(model_id: str, failure: Failure) -> StartFailed | InsufficientMemory:
        if failure.result == INSUFFICIENT_MEMORY:
            return InsufficientMemory(failure.message, failure.details)
        return StartFailed(
            f"model {model_id} did not start: {failure.message}",
            {
                "modelId": model_id,
                "result": failure.result,
                "advice": failure.advice,
                "exitStatus": failure.exit_status,
                "signal": failure.signal,
                "logLines": list(failure.log_lines),
            },
        )

    async def _outcome(self, model_id: str, message: str, *, changed: bool, settled: bool) -> Outcome:
        return Outcome(message, changed, settled, await self.server(model_id))

    @asynccontextmanager
    async def _following(self, model_id: str) -> AsyncIterator[Callable[[_Accept, float], Awaitable[bool]]]:
        """Listen from before a change is made, so that none of its effects is missed."""
        with self._events.subscribe() as changes:

            async def settled(accept: _Accept, wait: float) -> bool:
                deadline = asyncio.get_running_loop().time() + wait
                while not accept(self._reconciler.state(model_id)):
                    left = deadline - asyncio.get_running_loop().time()
                    if left <= 0:
                        return False
                    try:
                        async with asyncio.timeout(left):
                            await changes.next()
                    except TimeoutError:
                        return accept(self._reconciler.state(model_id))
                return True

            yield settled


def _stop_failed(model_id: str, failure: Failure) -> StopFailed:
    advice = f"; {failure.advice}" if failure.advice else ""
    return StopFailed(f"model {model_id}: {failure.message}{advice}", {"modelId": model_id, "advice": failure.advice})
