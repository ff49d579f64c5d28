"""Stopping servers that were started for requests, once nobody has asked them anything for a while.

A request by the gateway is use for as long as it lasts, its wait for the model included. Use of a server's own port is
seen by what the server counts: it is asked a few times in each span of idleness. Who comes while a server is being
stopped waits for that, and has it started again: nobody is sent to one that leaves.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.events import EventStream
from magi_agent.gateway.lanes import Lanes
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.self_reports import SelfReports
from magi_agent.servers.servers import Servers
from magi_agent.servers.states import UP
from magi_agent.vocabulary import StartPolicy

_LOG: Final = logging.getLogger(__name__)
BY: Final = "idle timeout"
"""Who stopped a server that was idle, in its history."""
_LOOKS: Final = 4
"""At a server, in one span of idleness."""
_COUNTED: Final = re.compile(
    rb"^llamacpp:(?:prompt_tokens_total|tokens_predicted_total|n_decode_total|requests_processing) +(\S+)", re.MULTILINE
)
"""What a server counts that grows with each request to the model (tools/server/README.md of llama.cpp)."""
_PROCESSING: Final = re.compile(rb"^llamacpp:requests_processing +0*[1-9]", re.MULTILINE)


class IdleStops:
    """Looks at servers that may be idle, and stops those that are."""

    def __init__(
        self,
        servers: Servers,
        registry: Registry,
        effective: EffectiveSettings,
        events: EventStream,
        reports: SelfReports,
        lanes: Lanes,
    ) -> None:
        self._servers = servers
        self._registry = registry
        self._effective = effective
        self._events = events
        self._reports = reports
        self._lanes = lanes
        self._watched: dict[str, _Watched] = {}
        self._stops: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Do so until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            with self._events.subscribe() as changes:
                while True:
                    next_look = await self._look(loop.time)
                    try:
                        async with asyncio.timeout_at(next_look):
                            # What changes may be a server that became ready, or a setting.
                            await changes.next()
                    except TimeoutError:
                        pass
        finally:
            for task in self._stops:
                task.cancel()
            await asyncio.gather(*self._stops, return_exceptions=True)

    def timeout_of(self, model_id: str) -> float | None:
        """Seconds of idleness after which a model's server is stopped."""
        model = self._registry.models.get(model_id)
        if model is None or self._effective.start_policy(model) is not StartPolicy.ON_DEMAND:
            return None
        return self._effective.of(model).idle_timeout_seconds

    async def _look(self, clock: Callable[[], float]) -> float | None:
        """Look at every server that it is time for; when the next look is due."""
        timeouts = {
            model_id: timeout
            for model_id in self._servers.ready()
            if (timeout := self.timeout_of(model_id)) is not None
        }
        for model_id in self._watched.keys() - timeouts.keys():
            del self._watched[model_id]
        for model_id, timeout in timeouts.items():
            watched = self._watched.get(model_id)
            if watched is None:
                watched = self._watched[model_id] = _Watched(clock(), clock() + timeout / _LOOKS)
            if clock() >= watched.look_at:
                watched.look_at = clock() + timeout / _LOOKS
                await self._look_at(model_id, watched, timeout, clock)
        return min((watched.look_at for watched in self._watched.values()), default=None)

    async def _look_at(self, model_id: str, watched: "_Watched", allowed: float, clock: Callable[[], float]) -> None:
        report = await self._reports.of(model_id)
        body = report.metrics.body if report else None
        counted = _COUNTED.findall(body) if body is not None else None
        # One that does not answer in time is busy, or in trouble that others look after.
        if counted is None or counted != watched.counted or (body and _PROCESSING.search(body)):
            watched.counted = counted
            watched.used_at = clock()
        if not self._lanes.is_idle(model_id) or self._servers.state(model_id) not in UP:
            return
        idle = clock() - max(watched.used_at, self._lanes.used_at(model_id))
        if idle >= allowed:
            task = asyncio.create_task(self._stop(model_id, idle), name=f"idle stop of {model_id}")
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)
        else:
            watched.look_at = min(watched.look_at, clock() + allowed - idle)

    async def _stop(self, model_id: str, idle: float) -> None:
        if not self._lanes.is_idle(model_id):
            return
        _LOG.info("server of %s is stopped: nobody has used it for %.0f seconds", model_id, idle)
        try:
            await self._lanes.send_away(model_id, BY)
        except MagiError as error:
            _LOG.warning("%s", error)


class _Watched:
    """A server that may be idle."""

    __slots__ = ("counted", "look_at", "used_at")

    def __init__(self, used_at: float, look_at: float) -> None:
        self.used_at = used_at
        """When it was seen in use last, on the event loop's clock."""
        self.look_at = look_at
        self.counted: list[bytes] | None = None
