"""Looks after servers that run: until they are proven ready, and whether they hang after that.

Each run of a unit's process is watched by one task, which the reconciler begins and ends as the unit changes. What
comes of it, the reconciler is told.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Protocol

from magi_agent.events import EventStream, ServerProgress
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.failure import Failure
from magi_agent.servers.liveness import Rhythm, wait_until_hung
from magi_agent.servers.llama_server import reach_of
from magi_agent.servers.reach import AtPort, Reach
from magi_agent.servers.readiness import LoadProgress, Patience, Verdict, wait_until_ready
from magi_agent.servers.record import ServerRecord
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus

_LOG: Final = logging.getLogger(__name__)
_RESULTS: Final = {
    Verdict.TIMEOUT: "start-timeout",
    Verdict.STRANGER: "port-in-use",
    Verdict.FORBIDDEN: "not-reachable",
}
"""In one word, why a server that runs was not ready."""

_Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]], str], asyncio.Task[None]]
_OnUnfit = Callable[[str, ServerRecord, UnitStatus, str, str], Awaitable[None]]


class RunEvidence(Protocol):
    """What can be found out about a unit that runs."""

    async def is_its_own(self, unit: UnitStatus, reach: Reach) -> bool | None:
        """Whether the unit's own processes listen there; ``None`` where nobody can tell."""

    async def holder_of(self, reach: Reach) -> str:
        """Who listens there, in words."""

    async def progress(self, unit: UnitStatus) -> LoadProgress:
        """A value that changes while the unit's processes get on."""


class OffloadCheck(Protocol):
    """Looks at servers that have become ready."""

    async def missing(self, unit: UnitStatus) -> Failure | None:
        """Why no GPU is used though that was asked for; ``None`` where one is, or nobody can tell, or nobody asked."""


class ReadinessWatch:
    """Watches the servers that run."""

    def __init__(
        self,
        manager: SystemdManager,
        evidence: RunEvidence,
        connections: ServerConnections,
        events: EventStream,
        patience: Patience,
        offload: OffloadCheck | None,
        rhythm: Rhythm,
        *,
        spawn: _Spawn,
        on_ready: Callable[[str, str, UnitStatus], None],
        on_unfit: _OnUnfit,
    ) -> None:
        """``spawn`` makes the tasks; ``on_ready`` is told a model whose server is ready, where, and its unit.

        ``on_unfit`` is told of one that is not ready or hangs: why, in a word and in a sentence.
        """
        self._manager = manager
        self._evidence = evidence
        self._connections = connections
        self._events = events
        self.patience = patience
        """What is waited for; another holds for what begins from then on."""
        self._offload = offload
        self.rhythm = rhythm
        """How it is looked whether a server hangs."""
        self._spawn = spawn
        self._on_ready = on_ready
        self._on_unfit = on_unfit

    def follow(self, model_id: str, record: ServerRecord, unit: UnitStatus) -> None:
        """See to it that a server which runs is proven ready."""
        if unit.active_state != "active" or unit.main_pid is None:
            self.end(record)
            return
        key = (unit.invocation_id, unit.main_pid)
        if record.proven == key or record.ending or record.restart:
            return
        if record.watched == key and record.watch and not record.watch.done():
            return
        reach = reach_of(unit.argv, unit.environment)
        if reach is None:
            if record.watched != key:
                _LOG.warning("%s was started without --port, so nobody can tell whether it is ready", unit.name)
            record.watched = key
            return
        self.end(record)
        record.watched = key
        record.watch = self._spawn(
            partial(self._await_readiness, model_id, record, unit, reach), f"readiness of {model_id}"
        )

    def end(self, record: ServerRecord) -> None:
        """Look no more after what runs."""
        if record.watch is not None:
            record.watch.cancel()
        record.watch = None
        record.watched = None

    async def _await_readiness(self, model_id: str, record: ServerRecord, unit: UnitStatus, reach: Reach) -> None:
        verdict = await wait_until_ready(
            self._connections,
            reach,
            is_its_own=lambda: self._evidence.is_its_own(self._manager.units.get(unit.name, unit), reach),
            progress=lambda: self._progress(model_id, unit),
            patience=self.patience,
        )
        if verdict is Verdict.READY:
            record.lack = await self._offload.missing(unit) if self._offload else None
            record.proven = (unit.invocation_id, unit.main_pid)
            record.ready_since = asyncio.get_running_loop().time()
            record.forget_failure()
            self._on_ready(model_id, reach.words, unit)
            await self._look_at_key(model_id, reach)
            await self._await_hanging(model_id, record, unit, reach)
            return
        message = await self._why_not_ready(verdict, reach)
        await self._on_unfit(model_id, record, unit, _RESULTS[verdict], message)

    async def _await_hanging(self, model_id: str, record: ServerRecord, unit: UnitStatus, reach: Reach) -> None:
        """Look after a server that is ready; one that hangs is no longer fit."""

        async def work() -> float | None:
            return (await self._evidence.progress(unit)).cpu_seconds

        seconds = await wait_until_hung(self._connections, reach, work, self.rhythm)
        message = f"it has not answered for {seconds:.0f} seconds, and did nothing"
        await self._on_unfit(model_id, record, unit, "hung", message)

    async def _progress(self, model_id: str, unit: UnitStatus) -> LoadProgress:
        """How far a server has come that is not ready yet; everybody is told."""
        progress = await self._evidence.progress(unit)
        began = unit.exec_main_start_timestamp or time.time()
        self._events.publish(
            ServerProgress(
                model_id=model_id,
                elapsed_seconds=round(max(0.0, time.time() - began), 3),
                cpu_seconds=progress.cpu_seconds,
                memory_bytes=progress.memory_bytes,
                read_bytes=progress.read_bytes,
            )
        )
        return progress

    async def _why_not_ready(self, verdict: Verdict, reach: Reach) -> str:
        if verdict is Verdict.STRANGER:
            return f"its {reach.words} is held by {await self._evidence.holder_of(reach)}, which answers in its place"
        if verdict is Verdict.FORBIDDEN:
            return (
                f"the agent may not connect to its {reach.words}; "
                "make the agent's user a member of the group of the user that the servers run as"
            )
        return f"it showed no progress for {self.patience.stillness:g} seconds and was not ready"

    async def _look_at_key(self, model_id: str, reach: Reach) -> None:
        """Have the server's key at hand, and say so if it cannot be: nobody can use the server then."""
        if isinstance(reach, AtPort) and reach.key_file is not None:
            try:
                await self._connections.key(reach.key_file)
            except OSError as error:
                _LOG.error(
                    "the key of %s cannot be read from %s: %s; restart it for another one: magictl restart %s",
                    model_id, reach.key_file, error.strerror, model_id,
                )  # fmt: skip
