"""The reconciler: the only part that starts and stops servers.

One loop. It looks at what is desired and at the units systemd has, makes a plan (``plan.py``), and carries it out,
each model's step in a task of its own and never two for one model. Whatever changes (a wish, a unit, a connection)
only wakes the loop; what to do is always decided from the whole situation, so a signal that was lost costs time and
nothing else.

::

    absent ──start──▶ starting ──exec──▶ loading ──proven──▶ ready ──stop──▶ stopping ──▶ absent
                          ▲                 │ failed, or no progress           │
                          └── cool-down ◀───┴──────────────◀───────────────────┘ failed

What survives SIGKILL is stuck, whatever came before, and nothing is done about it until its processes are gone.

An end that the agent did not bring about is somebody's word if it was clean: systemctl stop, or of the slice. It is
taken back by any wish that is newer than it. That holds too where it came while nobody looked: before the agent was
there, or while the bus was gone. So nothing is started after such a time until that has been sorted out.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Protocol

from magi_agent.errors import MagiError
from magi_agent.events import EventStream, ServerChanged, ServerTroubled
from magi_agent.servers.admission import Admission, Situation
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.desired import Desired, Wish
from magi_agent.servers.diagnosis import advice_on
from magi_agent.servers.failure import INSUFFICIENT_MEMORY, Failure, ended_early, failure_of, not_started
from magi_agent.servers.last_words import EndEvidence, LastWords
from magi_agent.servers.launch import LaunchSpecification, model_id_of, unit_name
from magi_agent.servers.launcher import Launcher
from magi_agent.servers.life_notes import (
    OUTSIDE,
    note_failure,
    note_ready,
    note_retry,
    note_start,
    note_stop,
    note_stop_from_outside,
)
from magi_agent.servers.liveness import RHYTHM, Rhythm
from magi_agent.servers.llama_server import reach_of
from magi_agent.servers.memory_limits import chosen_limits
from magi_agent.servers.narrow_limits import warnings_of
from magi_agent.servers.plan import Plan, Step, UnitCondition, Verb, awaits_retry, condition_of, make_plan
from magi_agent.servers.readiness import Patience
from magi_agent.servers.readiness_watch import OffloadCheck, ReadinessWatch, RunEvidence
from magi_agent.servers.record import ServerRecord
from magi_agent.servers.start_order import StartOrder
from magi_agent.servers.states import state_of
from magi_agent.systemd.errors import BusDisconnected
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitChange, UnitStatus
from magi_agent.vocabulary import ServerState

_LOG: Final = logging.getLogger(__name__)
_Work = Callable[[], Coroutine[Any, Any, None]]
_STARTS_AT_ONCE: Final = 4
_LOOK_AGAIN: Final = 30.0
_BUS_PAUSE: Final = 0.05
"""Seconds in which the end of a connection becomes known to everybody."""
_STEP_PAUSE: Final = 1.0
"""Seconds before a step that could not be taken is planned again, at first."""
_LONGEST_STEP_PAUSE: Final = 8.0
_SURVIVORS_PAUSE: Final = 1.0
"""Seconds between two looks whether what survived SIGKILL is gone: systemd does not tell."""

_ON_THE_MOVE: Final = frozenset({UnitCondition.GOING, UnitCondition.QUEUED})

_ENDED: Final = frozenset({ServerState.STOPPED, ServerState.FAILED, ServerState.COOLDOWN})
_BEING_STARTED: Final = frozenset({ServerState.STARTING, ServerState.LOADING})

_PAST: Final = {Verb.STOP: "stopped", Verb.RESTART: "stopped", Verb.CLEAR: "cleared away"}

OUTCOMES: Final = frozenset(
    {ServerState.READY, ServerState.DEGRADED, ServerState.FAILED, ServerState.COOLDOWN, ServerState.STUCK}
)
"""The states in which a start has ended, one way or the other."""


class Preparation(Protocol):
    """What must be settled before a start."""

    def knows(self, model_id: str) -> bool:
        """Whether there is such a model now; one that went may come back, and what was wished for it holds again."""

    async def launch_for(self, model_id: str) -> LaunchSpecification:
        """How a model is to be started now. Raises ``MagiError`` where it cannot be."""


class Evidence(RunEvidence, EndEvidence, Protocol):
    """What can be found out about a unit that runs, or ran."""

    def survived(self, unit: UnitStatus) -> Failure | None:
        """Why a unit that systemd has given up is not gone; ``None`` where none of its processes is left."""


class Reconciler:
    """Brings the servers from what is to what should be."""

    def __init__(
        self,
        manager: SystemdManager,
        launcher: Launcher,
        desired: Desired,
        preparation: Preparation,
        evidence: Evidence,
        connections: ServerConnections,
        events: EventStream,
        patience: Patience,
        stop_timeout: float,
        admission: Admission,
        order: StartOrder,
        offload: OffloadCheck | None = None,
        rhythm: Rhythm = RHYTHM,
    ) -> None:
        self._manager = manager
        self._launcher = launcher
        self._desired = desired
        self._preparation = preparation
        self._evidence = evidence
        self._connections = connections
        self._events = events
        self._stop_timeout = stop_timeout
        self._admission = admission
        self._order = order
        self._last_words = LastWords(evidence)
        self._watch = ReadinessWatch(
            manager,
            evidence,
            connections,
            events,
            patience,
            offload,
            rhythm,
            spawn=self._spawn,
            on_ready=self._became_ready,
            on_unfit=self._give_up,
        )
        self._records: dict[str, ServerRecord] = {}
        self._wake = asyncio.Event()
        self._starting = asyncio.Semaphore(_STARTS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_task: asyncio.Task[None] | None = None
        self._live = False
        self._halted = False
        self._absences = 1
        self._sorted_out = 0
        """The absences, by number, after which it was looked what ended unseen."""
        desired.on_change = self.wake
        admission.look = self._situation
        self.last_look = 0.0
        """When the loop last looked, on the event loop's clock; a liveness probe reads it."""

    def reconfigure(self, patience: Patience, stop_timeout: float) -> None:
        """Take another patience and another time in seconds to stop in, for what begins from now on."""
        self._watch.patience = patience
        self._stop_timeout = stop_timeout
        self._retry_for_memory()

    async def start(self) -> None:
        """Begin to reconcile. Until then nothing that is said of units counts."""
        self._live = True
        self.last_look = asyncio.get_running_loop().time()
        await self.look_after_absence()
        self._loop_task = self._spawn(self._run, "reconciler")

    async def stop(self) -> None:
        """Let go of everything; the servers run on."""
        self._live = False
        self._halted = True
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._desired.settled()

    def halt(self) -> None:
        """Start nothing any more: the host is going down."""
        self._halted = True

    def wake(self) -> None:
        """Something changed; look again."""
        self._wake.set()

    def state(self, model_id: str) -> ServerState:
        """The state a model's server is in."""
        record = self._records.get(model_id)
        return record.state if record else ServerState.STOPPED

    def wants(self, model_id: str) -> bool:
        """Whether a model's server should run, as far as is known; ``Desired`` learns last of a stop from outside."""
        wish = self._desired[model_id]
        return wish is not None and wish.run and wish is not self._record(model_id).let_go

    def failure(self, model_id: str) -> Failure | None:
        """Why a model's server failed last, could not be stopped, or is degraded, while that matters."""
        record = self._records.get(model_id)
        if record is None:
            return None
        lack = record.lack if record.state is ServerState.DEGRADED else None
        return record.stuck or record.failure or self.trouble(model_id) or lack

    def trouble(self, model_id: str) -> Failure | None:
        """Why what is wished for could not be done about a model's server; it is tried again."""
        record = self._records.get(model_id)
        if record and record.stuck:
            return record.stuck
        return record.trouble if record and record.troubled is self._desired[model_id] else None

    @property
    def troubles(self) -> Mapping[str, Failure]:
        """The ``trouble`` of every model that has some."""
        return {model_id: trouble for model_id in self._records if (trouble := self.trouble(model_id))}

    @property
    def lacks(self) -> Mapping[str, Failure]:
        """What each server that is degraded does without."""
        return {
            model_id: record.lack
            for model_id, record in self._records.items()
            if record.lack and record.state is ServerState.DEGRADED
        }

    def retry_in(self, model_id: str) -> float | None:
        """Seconds until a model that failed is tried again."""
        record = self._records.get(model_id)
        if record is None or record.retry_at is None:
            return None
        return max(0.0, record.retry_at - asyncio.get_running_loop().time())

    def forgive(self, model_id: str) -> None:
        """Forget a model's failures: a person wants it started now."""
        record = self._record(model_id)
        record.forget_failure()
        record.attempts = 0
        self._announce(model_id)
        self.wake()

    def ask_restart(self, model_id: str) -> None:
        """Replace the running server of a model."""
        self.forgive(model_id)
        self._record(model_id).restart = True
        self.wake()

    def restart_pending(self, model_id: str) -> bool:
        """Whether a restart was asked for and what ran before has not ended yet."""
        record = self._records.get(model_id)
        return record is not None and record.restart

    def plan(self, wanted: Mapping[str, bool] | None = None) -> Plan:
        """What would be done now, or if ``wanted`` were desired; nothing is carried out."""
        if wanted is None:
            wanted = {
                model_id: self.wants(model_id)
                for model_id, wish in self._desired.wishes.items()
                if not wish.run or self._preparation.knows(model_id)
            }
        units = {
            (model_id := model_id_of(name)): self._record(model_id).condition(unit)
            for name, unit in self._manager.units.items()
        }
        return make_plan(
            wanted,
            units,
            restarts={model_id for model_id, record in self._records.items() if record.restart},
            retry_at={
                model_id: record.retry_at for model_id, record in self._records.items() if record.retry_at is not None
            },
            now=asyncio.get_running_loop().time(),
            order=self._order.rank,
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
        if not self._live:
            return
        model_id = model_id_of(change.name)
        record = self._record(model_id)
        before, after = condition_of(change.before), condition_of(change.after)
        if after is UnitCondition.UP and change.after is not None:
            if before is not UnitCondition.UP and not record.is_doing(Verb.STOP) and not record.is_doing(Verb.RESTART):
                record.ending = False
            if awaits_retry(change.after) and (record.ended is None or not record.ended.is_of(change.after)):
                record.ended = ended = failure_of(change.after)
                self._background(
                    partial(self._explain_end, model_id, record, ended, change.after), f"last words of {model_id}"
                )
            note_retry(model_id, record, change)
            self._watch.follow(model_id, record, change.after)
            self._note_met(model_id, record, change.after)
        else:
            self._watch.end(record)
        if after is UnitCondition.UP:
            record.stuck = None
        elif after is UnitCondition.ABSENT and change.after and (stuck := self._evidence.survived(change.after)):
            self._be_stuck(model_id, record, change.after, stuck)
        if after is not UnitCondition.UP and before not in _ON_THE_MOVE:
            # One that was leaving already when it was first looked at may do so because an agent said so that is dead.
            is_known = change.before is not None or self._desired.is_met(model_id)
            record.leaving = self._desired[model_id] if is_known else None
        if after is UnitCondition.FAILED and change.after is not None:
            self._unit_failed(model_id, record, change.after)
            record.restart = record.restart and not record.ending
            record.ending = False
        elif after is UnitCondition.ABSENT and before in (UnitCondition.UP, *_ON_THE_MOVE):
            self._unit_gone(model_id, record, change)
            record.ending = record.restart = False
        if after in (UnitCondition.ABSENT, UnitCondition.FAILED) and before in (UnitCondition.UP, *_ON_THE_MOVE):
            self._admission.note_ended(model_id, is_to_start=self._is_to_start(model_id) and record.failure is None)
            self._retry_for_memory()
        self._announce(model_id)
        self.wake()

    def retry_with_new_files(self, model_ids: Iterable[str]) -> None:
        """Have those of some models tried at once that failed: their files are there again, or are others."""
        for model_id in model_ids:
            record = self._records.get(model_id)
            if record is not None and record.failure is not None and record.retry_at:
                record.try_early()
        self.wake()

    def _retry_for_memory(self) -> None:
        """Have those tried at once that did not fit into memory: some of it came back."""
        for record in self._records.values():
            if record.failure is not None and record.failure.result == INSUFFICIENT_MEMORY and record.retry_at:
                record.try_early()
        self.wake()

    def _situation(self) -> Situation:
        """Which servers take memory, and which are about to give it back."""
        standing: dict[str, UnitStatus | None] = {}
        running, ready, leaving = [], [], []
        for model_id, record in self._records.items():
            unit = self._manager.get(unit_name(model_id))
            condition = record.condition(unit)
            has_unit = condition in (UnitCondition.UP, *_ON_THE_MOVE)
            is_restarted = record.is_doing(Verb.RESTART) or (record.restart and has_unit)
            is_unwanted = self._desired[model_id] is not None and not self.wants(model_id)
            if condition is UnitCondition.GOING or record.is_doing(Verb.STOP) or (has_unit and is_unwanted):
                leaving.append(model_id)
            elif is_restarted:
                leaving.append(model_id)
                standing[model_id] = unit
            elif condition is UnitCondition.UP:
                standing[model_id] = unit
                running.append(model_id)
                if unit is not None and record.proven == (unit.invocation_id, unit.main_pid):
                    ready.append(model_id)
            elif record.is_doing(Verb.START) or (self._is_to_start(model_id) and record.failure is None):
                standing[model_id] = unit
        return Situation(standing, running, ready, leaving)

    def _is_to_start(self, model_id: str) -> bool:
        return self.wants(model_id) and self._preparation.knows(model_id)

    def lose_sight(self) -> None:
        """Take note that units may change unseen from now on; nothing is started until ``look_after_absence``."""
        self._absences += 1

    @property
    def _unsure(self) -> bool:
        """Whether units may have ended unseen."""
        return self._sorted_out != self._absences

    async def look_after_absence(self) -> None:
        """Take all units as they are now, and what ended unseen as somebody's word."""
        if not self._manager.connected:
            return  # with the connection comes the next look
        absence = self._absences
        ended = [
            model_id
            for model_id, wish in self._desired.wishes.items()
            if wish.run
            and self._desired.is_met(model_id)
            and condition_of(self._manager.get(unit_name(model_id))) is UnitCondition.ABSENT
        ]
        for model_id in ended:
            note_stop_from_outside(model_id, None)
        if ended:
            try:
                await self._desired.wish(ended, run=False, by=OUTSIDE)
            except MagiError as error:
                _LOG.error("%s", error)
                for model_id in ended:
                    self._record(model_id).let_go = self._desired[model_id]
        self._sorted_out = absence
        self._look_at_all()

    def _look_at_all(self) -> None:
        if not self._live:
            return
        for name, unit in list(self._manager.units.items()):
            self.unit_changed(UnitChange(name, None, unit))
        for model_id in {*self._records, *self._desired.wishes}:
            self._announce(model_id)
        self.wake()

    def _note_met(self, model_id: str, record: ServerRecord, unit: UnitStatus) -> None:
        """Have it kept that the server runs as wished, so that an end which nobody saw is taken for what it is."""
        if self._desired.is_met(model_id) or record.noting or unit.active_state != "active":
            return
        if self._runs_as_wished(model_id, record):
            record.noting = True
            self._background(partial(self._keep_met, model_id, record), f"note on {model_id}")

    async def _keep_met(self, model_id: str, record: ServerRecord) -> None:
        try:
            if self._runs_as_wished(model_id, record):
                await self._note(model_id, met=True)
        finally:
            record.noting = False

    def _runs_as_wished(self, model_id: str, record: ServerRecord) -> bool:
        return self.wants(model_id) and not record.restart and not record.ending

    async def _note(self, model_id: str, *, met: bool) -> None:
        try:
            await self._desired.note_met(model_id, met)
        except MagiError as error:
            # No reason to start or stop nothing: only an end that nobody sees may be misunderstood.
            _LOG.warning("%s", error)

    def _unit_failed(self, model_id: str, record: ServerRecord, unit: UnitStatus) -> None:
        stuck = self._evidence.survived(unit)
        if stuck and record.ending:
            # systemd starts nothing again after a stop, so these are no processes of a next run.
            self._be_stuck(model_id, record, unit, stuck)
        if record.counted == unit.invocation_id and (stuck is None or record.stuck):
            return
        if record.ending:
            record.counted = unit.invocation_id
            if stuck is None:
                _LOG.warning("server of %s had to be killed to stop it (%s)", model_id, unit.result)
            return
        record.doubtful = unit.invocation_id
        self._background(partial(self._judge_failure, model_id, record, unit), f"failure of {model_id}")

    def _be_stuck(self, model_id: str, record: ServerRecord, unit: UnitStatus, stuck: Failure) -> None:
        """Take note of processes that systemd left behind when it gave the unit up."""
        if record.stuck is None:
            record.stuck = stuck = replace(stuck, invocation_id=unit.invocation_id or None)
            self._tell_failure(model_id, stuck)
            self._background(partial(self._await_release, model_id, record, unit, stuck), f"survivors of {model_id}")

    async def _await_release(self, model_id: str, record: ServerRecord, unit: UnitStatus, stuck: Failure) -> None:
        """Have the server's name and memory taken for as long as processes are left of its last run."""
        while record.stuck is stuck:
            if not self._evidence.survived(unit):
                record.stuck = None
                _LOG.info("server of %s: what had survived SIGKILL is gone", model_id, extra={"magi_model": model_id})
                self._announce(model_id)
                self.wake()
                return
            await asyncio.sleep(_SURVIVORS_PAUSE)

    async def _judge_failure(self, model_id: str, record: ServerRecord, unit: UnitStatus) -> None:
        """Tell a failure from the moment before systemd's own restart, in which a unit is shown as failed too."""
        try:
            now = await self._manager.refresh(unit.name)
            if now and condition_of(now) is UnitCondition.FAILED and (stuck := self._evidence.survived(now)):
                again = await self._manager.refresh(unit.name)
                if condition_of(again) is UnitCondition.FAILED and again and again.invocation_id == now.invocation_id:
                    self._be_stuck(model_id, record, now, stuck)
        except BusDisconnected:
            return  # with the connection comes the question again
        finally:
            if record.doubtful == unit.invocation_id and self._manager.connected:
                record.doubtful = None
        if now and condition_of(now) is UnitCondition.FAILED and record.counted != now.invocation_id:
            self._record_failure(model_id, record, failure_of(now), now)
        self._announce(model_id)
        self.wake()

    def _unit_gone(self, model_id: str, record: ServerRecord, change: UnitChange) -> None:
        """A clean end that the agent did not ask for is somebody's word: it stays stopped."""
        wish, unit = self._desired[model_id], change.before
        if record.ending or wish is None or not self.wants(model_id) or self._halted or unit is None:
            return
        if not self._manager.connected or wish is not record.leaving:
            # Nobody can tell who did it, or somebody has asked for another run since.
            return
        if unit.active_state == "active" and unit.job_id is None and not record.was_ready(unit):
            # No stop led up to this, and a server does not end before it is ready unless something is wrong.
            self._record_failure(model_id, record, ended_early(change.after or unit), unit)
            return
        record.let_go = wish
        note_stop_from_outside(model_id, unit)
        self._background(partial(self._respect_stop, model_id, wish), f"stop of {model_id}")

    async def _respect_stop(self, model_id: str, overruled: Wish) -> None:
        if self._desired[model_id] is not overruled:
            return
        try:
            await self._desired.wish([model_id], run=False, by=OUTSIDE)
        except MagiError as error:
            # It stays stopped for as long as this agent runs; only the next one would not know.
            _LOG.error("%s", error)  # the sentence says it all

    def _record_failure(self, model_id: str, record: ServerRecord, failure: Failure, unit: UnitStatus) -> None:
        """Count a failure; it is told of once its last words are known."""
        record.counted = unit.invocation_id
        record.recording = failure
        record.restart = False
        self._admission.note_failed(model_id)
        record.count_failure(failure, asyncio.get_running_loop().time())
        self._background(partial(self._note, model_id, met=False), f"note on {model_id}")
        self._background(partial(self._add_last_lines, model_id, record, failure, unit), f"last words of {model_id}")

    async def _add_last_lines(self, model_id: str, record: ServerRecord, failure: Failure, unit: UnitStatus) -> None:
        try:
            told = await self._last_words.explained(model_id, failure, unit)
        finally:
            if record.recording is failure:
                record.recording = None
        if record.failure is failure:
            record.failure = told
            self._tell_failure(model_id, told)

    async def _explain_end(self, model_id: str, record: ServerRecord, ended: Failure, unit: UnitStatus) -> None:
        told = await self._last_words.explained(model_id, ended, unit)
        if record.ended is ended:
            record.ended = told

    def _fail(self, model_id: str, failure: Failure) -> None:
        record = self._record(model_id)
        is_known = record.failure is not None and record.failure.result == failure.result == INSUFFICIENT_MEMORY
        record.count_failure(failure, asyncio.get_running_loop().time())
        if is_known:
            # It is tried again whenever a server ends or is ready: the journal has said it already.
            self._announce(model_id)
            self.wake()
            return
        self._tell_failure(model_id, failure)

    def _tell_failure(self, model_id: str, failure: Failure) -> None:
        note_failure(model_id, failure)
        self._announce(model_id)
        self.wake()

    def _became_ready(self, model_id: str, where: str, unit: UnitStatus) -> None:
        record = self._record(model_id)
        if record.is_doing(Verb.START):
            # systemd's signals were here before the launcher's answer, which may never come.
            note_start(model_id, record, self._desired[model_id], unit)
        note_ready(model_id, where, record.lack, unit)
        self._announce(model_id)
        self._admission.note_ready()
        self._retry_for_memory()

    async def _give_up(self, model_id: str, record: ServerRecord, unit: UnitStatus, result: str, message: str) -> None:
        """Count a server that runs as failed, and have it replaced, if anybody wants it."""
        if not self.wants(model_id):
            _LOG.warning("server of %s: %s; nobody asked for it, so it is left alone", model_id, message)
            return
        advice = advice_on(result, model_id)
        failure = Failure(datetime.now(UTC), result, message, advice, invocation_id=unit.invocation_id or None)
        failure = await self._last_words.quoted(failure, unit)
        record.counted = unit.invocation_id
        record.restart = True
        self._fail(model_id, failure)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self.last_look = loop.time()
            try:
                wake_at = self._step_all() if self._manager.connected and not self._unsure else None
            except Exception:  # noqa: BLE001  # see below
                # A defect in the plan for one situation must not leave every model without a keeper.
                _LOG.exception("the reconciler met a defect; it looks again")
                wake_at = loop.time() + _STEP_PAUSE
            pause = _LOOK_AGAIN if wake_at is None else max(0.0, min(_LOOK_AGAIN, wake_at - loop.time()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    def _step_all(self) -> float | None:
        for name, unit in self._manager.units.items():
            # Were a watch to end before its time, this look would be the one to set it up again.
            if condition_of(unit) is UnitCondition.UP:
                model_id = model_id_of(name)
                self._watch.follow(model_id, self._record(model_id), unit)
                self._note_met(model_id, self._record(model_id), unit)
        for model_id in self._admission.waiting:
            record = self._record(model_id)
            if record.step is not None and (self._halted or self._desired.drain or not self.wants(model_id)):
                record.step.cancel()
        plan = self.plan()
        for step in plan.steps:
            if self._halted and step.verb is not Verb.STOP:
                continue
            if self._desired.drain and step.verb in (Verb.START, Verb.RESTART):
                continue
            record = self._record(step.model_id)
            if record.step is None or record.step.done():
                record.verb = step.verb
                record.step = self._spawn(partial(self._carry_out, step), f"{step.verb} of {step.model_id}")
                record.step.add_done_callback(partial(self._step_ended, step.model_id))
                self._announce(step.model_id)
            elif step.verb is Verb.STOP and record.is_doing(Verb.START):
                # The unit is there, and systemd's stop job replaces its start job: no need to wait for that one.
                record.step.cancel()
        return plan.wake_at

    async def _carry_out(self, step: Step) -> None:
        record = self._record(step.model_id)
        try:
            match step.verb:
                case Verb.START:
                    await self._start(step.model_id, record)
                case Verb.STOP:
                    await self._stop(step.model_id, record)
                    record.forget_failure()
                case Verb.RESTART:
                    # Were the agent to die between stop and start, the next one must not take it for somebody's word.
                    await self._note(step.model_id, met=False)
                    if record.failure is None:
                        await self._admission.hold(step.model_id)
                    await self._stop(step.model_id, record)
                case Verb.CLEAR:
                    await self._launcher.clear(step.model_id)
                    record.forget_failure()
            record.forget_trouble()
        except BusDisconnected as error:
            # Whether it took effect is not known: with the connection comes the whole truth, and a new plan.
            _LOG.warning("%s of %s: %s", step.verb, step.model_id, error)
            await asyncio.sleep(_BUS_PAUSE)
        except MagiError as error:
            if step.verb is not Verb.START:
                self._trouble(step, record, error)
                # The plan asks for the same again at once.
                await asyncio.sleep(min(_STEP_PAUSE * 2 ** (record.tries - 1), _LONGEST_STEP_PAUSE))
            elif self.wants(step.model_id):
                self._fail(step.model_id, not_started(error))
        except Exception as error:
            # A defect. It is reported as one; the pause keeps the loop from running hot on it.
            if step.verb is Verb.START:
                self._fail(
                    step.model_id, Failure(datetime.now(UTC), "start-error", f"a defect of the agent: {error!r}")
                )
            else:
                await asyncio.sleep(_STEP_PAUSE)
            raise

    def _trouble(self, step: Step, record: ServerRecord, error: MagiError) -> None:
        """Tell that a step which is no start could not be taken; the same again is told to nobody but who waits."""
        message = f"it cannot be {_PAST[step.verb]}, which is tried again: {error}"
        if record.note_trouble(Failure(datetime.now(UTC), "stop-error", message), self._desired[step.model_id]):
            _LOG.error("server of %s: %s", step.model_id, message, extra={"magi_model": step.model_id})
        self._events.publish(ServerTroubled(model_id=step.model_id, message=message))

    def _step_ended(self, model_id: str, _: asyncio.Task[None]) -> None:
        self._announce(model_id)
        self.wake()

    async def _start(self, model_id: str, record: ServerRecord) -> None:
        record.restart = False
        placed = await self._admission.admit(
            self._order.rank(model_id), partial(self._prepared, model_id), partial(self._is_forced, model_id)
        )
        record.overruled = placed.overruled
        if placed.need:
            for warning in warnings_of(placed.need, chosen_limits(placed.launch.runtime_settings)):
                _LOG.warning("%s is started, but: %s", model_id, warning, extra={"magi_model": model_id})
        async with self._starting:
            if await self._manager.is_stopping():
                _LOG.info("the host is going down: %s is not started", model_id)
                self.halt()
            if self._halted or self._desired.drain or not self.wants(model_id):
                return
            await self._note(model_id, met=False)
            result = await self._launcher.start(placed.launch)
        # The launcher's answer may be here before systemd's signals, and the history tells runs by their invocation.
        unit = await self._manager.refresh(unit_name(model_id))
        if result.ok:
            note_start(model_id, record, self._desired[model_id], unit)
        elif condition_of(unit) is UnitCondition.ABSENT and self.wants(model_id):
            message = f"systemd's job to start it ended with {result.value!r}"
            self._fail(model_id, Failure(datetime.now(UTC), "start-error", message))

    async def _prepared(self, model_id: str) -> LaunchSpecification:
        async with self._starting:
            return await self._preparation.launch_for(model_id)

    def _is_forced(self, model_id: str) -> bool:
        wish = self._desired[model_id]
        return wish is not None and wish.run and wish.is_forced

    async def _stop(self, model_id: str, record: ServerRecord) -> None:
        record.ending = True
        self._watch.end(record)
        self._announce(model_id)
        unit = self._manager.get(unit_name(model_id))
        if unit is not None and (reach := reach_of(unit.argv, unit.environment)):
            self._connections.let_go(reach)
        try:
            result = await self._launcher.stop(model_id, self._stop_timeout)
        finally:
            record.ending = condition_of(self._manager.get(unit_name(model_id))) in _ON_THE_MOVE
        if result.ok and unit is not None and record.stuck is None:
            note_stop(model_id, record, self._desired[model_id], unit, is_wanted=self.wants(model_id))

    def _announce(self, model_id: str) -> None:
        """Tell everybody, if the state of a model's server is another than they were told."""
        record = self._record(model_id)
        run = self.wants(model_id)
        known = self._preparation.knows(model_id) if run else True
        unit = self._manager.get(unit_name(model_id))
        state = state_of(
            record,
            unit,
            wanted=run if self._desired[model_id] and known else None,
            startable=not self._halted and not self._unsure and not self._desired.drain,
        )
        if state is not None and state is not record.state:
            before, record.state = record.state, state
            failure = self._failure_behind(before, state, record, unit)
            self._events.publish(
                ServerChanged(
                    model_id=model_id,
                    before=before,
                    after=state,
                    result=failure.result if failure else None,
                    message=failure.message if failure else None,
                    is_forced=state in _BEING_STARTED and self._is_forced(model_id),
                )
            )

    @staticmethod
    def _failure_behind(
        before: ServerState, state: ServerState, record: ServerRecord, unit: UnitStatus | None
    ) -> Failure | None:
        """Why a server went from a state to another, where a failure is behind it."""
        if state is ServerState.STUCK:
            return record.stuck
        if state in (ServerState.FAILED, ServerState.COOLDOWN):
            return record.failure
        if state is ServerState.DEGRADED:
            return record.lack
        if before in _ENDED:
            # It is started anew, and what its last run failed with was told.
            return None
        if state is ServerState.STARTING and unit and unit.main_pid is None and unit.result not in ("", "success"):
            # It died, and systemd starts it anew.
            return failure_of(unit)
        return None

    def _record(self, model_id: str) -> ServerRecord:
        return self._records.setdefault(model_id, ServerRecord())

    def _background(self, work: _Work, name: str) -> None:
        _ = self._spawn(work, name)  # kept in self._tasks, by which stop() ends it

    def _spawn(self, work: _Work, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(_reporting(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _reporting(work: _Work, name: str) -> None:
    try:
        await work()
    except MagiError as error:
        _LOG.error("%s: %s", name, error)
    except Exception:  # noqa: BLE001  # see below
        # The end of the line for a background task: without this nobody would ever hear of it.
        _LOG.exception("%s ended with a defect", name)
