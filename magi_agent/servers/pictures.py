"""Each server at one moment, as it is shown."""

import logging
import time
from dataclasses import dataclass
from typing import Final

import psutil

from magi_agent.registry.model import Model
from magi_agent.servers.failure import Failure
from magi_agent.servers.launch import unit_name
from magi_agent.servers.llama_server import differences, port_of, reach_of
from magi_agent.servers.plan import UnitCondition, condition_of
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.reconciler import Reconciler
from magi_agent.servers.states import RUNNING, UP
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerState, Tier

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """One model's server at one moment."""

    model_id: str
    display_name: str
    unit: str
    state: ServerState
    port: int | None
    url: str | None
    """Where it is: ``http://…``, or ``unix:`` and the path of a socket."""
    pid: int | None
    uptime_seconds: int
    restarts: int
    tier: Tier
    is_thinking: bool
    memory_bytes: int | None
    """Of the unit's cgroup where that is accounted for, else resident memory of the main process."""
    cpu_seconds: float | None
    failure: Failure | None
    retry_in: float | None
    restart_reasons: tuple[str, ...]

    @property
    def is_running(self) -> bool:
        """Whether it has processes, or is about to."""
        return self.state in RUNNING

    @property
    def is_ready(self) -> bool:
        """Whether it answers."""
        return self.state in UP


class Pictures:
    """Puts together what systemd, the reconciler and the registry know of a server."""

    def __init__(self, manager: SystemdManager, reconciler: Reconciler, preparation: StartPreparation) -> None:
        self._manager = manager
        self._reconciler = reconciler
        self._preparation = preparation

    async def of(self, model: Model) -> Server:
        """One model's server, running or not."""
        model_id = model.model_id
        unit = self._manager.units.get(unit_name(model_id))
        runs = unit is not None and condition_of(unit) in (UnitCondition.UP, UnitCondition.GOING)
        port = (port_of(unit.argv) if unit and runs else None) or model.choices.port
        is_there = runs or self._reconciler.state(model_id) is ServerState.STUCK
        memory, cpu = await self._usage(unit) if unit and is_there else (None, None)
        since = unit.exec_main_start_timestamp if unit and runs and unit.main_pid else None
        reach = reach_of(unit.argv, unit.environment) if unit and runs else None
        return Server(
            model_id=model_id,
            display_name=model.facts.display_name or model.facts.filename,
            unit=unit_name(model_id),
            state=self._reconciler.state(model_id),
            port=port,
            url=reach.url if reach else None,
            pid=unit.main_pid if unit and runs else None,
            uptime_seconds=max(0, int(time.time() - since)) if since else 0,
            restarts=unit.n_restarts if unit else 0,
            tier=model.effective_tier,
            is_thinking=model.effective_thinking,
            memory_bytes=memory,
            cpu_seconds=cpu,
            failure=self._reconciler.failure(model_id),
            retry_in=self._reconciler.retry_in(model_id),
            restart_reasons=self._restart_reasons(model, unit) if unit and runs else (),
        )

    def _restart_reasons(self, model: Model, unit: UnitStatus) -> tuple[str, ...]:
        launch = self._preparation.launch_of(model, model.choices.port or port_of(unit.argv) or 0)
        reasons = differences(launch, unit.argv, unit.environment)
        return (*reasons, *self._preparation.refused_flags(launch), *self._preparation.binary_news(launch, unit))

    async def _usage(self, unit: UnitStatus) -> tuple[int | None, float | None]:
        """Memory in bytes and CPU time in seconds, as well as they can be known."""
        memory = cpu = None
        try:
            accounting = await self._manager.read_accounting(unit.name)
        except BusError as error:
            _LOG.debug("no accounting of %s: %s", unit.name, error)
        else:
            memory = accounting.memory_current
            cpu = accounting.cpu_usage_nsec / 1e9 if accounting.cpu_usage_nsec is not None else None
        if unit.main_pid and (memory is None or cpu is None):
            try:
                process = psutil.Process(unit.main_pid)
                times = process.cpu_times()
                memory = process.memory_info().rss if memory is None else memory
                cpu = times.user + times.system if cpu is None else cpu
            except psutil.Error:
                return memory, cpu
        return memory, cpu
