"""What can be found out about a unit that runs, or ran: whose port it is, whether it gets on, what it said last."""

from typing import Final

import psutil

from magi_agent.host.listeners import owned_by
from magi_agent.servers.failure import LOG_LINES
from magi_agent.systemd.journal import Journal
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus

_SUFFIX: Final = ".service"


class UnitEvidence:
    """Asks the kernel, systemd and the journal."""

    def __init__(self, manager: SystemdManager, journal: Journal) -> None:
        self._manager = manager
        self._journal = journal

    async def owns_port(self, unit: UnitStatus, port: int) -> bool | None:
        """Whether the unit's own processes listen on the port; ``None`` where the kernel does not tell."""
        return owned_by(port, unit.control_group)

    async def progress(self, unit: UnitStatus) -> object:
        """CPU time and bytes read so far: what loading a model costs, fast or slow."""
        accounting = await self._manager.read_accounting(unit.name)
        if unit.main_pid is None:
            return accounting.cpu_usage_nsec
        try:
            process = psutil.Process(unit.main_pid)
            times = process.cpu_times()
            read: int | None = process.io_counters().read_bytes
        except psutil.AccessDenied:
            read = None
            times = None
        except psutil.Error:
            return accounting.cpu_usage_nsec
        return accounting.cpu_usage_nsec, times and (times.user, times.system), read

    async def last_log_lines(self, unit: UnitStatus) -> tuple[str, ...]:
        """The last lines of the unit's last run."""
        entries = await self._journal.read_last(
            unit.name.removesuffix(_SUFFIX), lines=LOG_LINES, invocation_id=unit.invocation_id or None
        )
        return tuple(entry.message for entry in entries)
