"""What can be found out about a unit that runs, or ran: who answers for it, whether it gets on, what it said last."""

import asyncio
import contextlib
import re
import time
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

from magi_agent.host.listeners import owned_by
from magi_agent.host.unix_listeners import unix_listener, unix_owned_by
from magi_agent.servers.diagnosis import READ_LINES, Diagnosis, MemoryEnd
from magi_agent.servers.failure import Failure
from magi_agent.servers.llama_server import memory_limits_of, set_memory_limits_of
from magi_agent.servers.memory_limits import source_of
from magi_agent.servers.port_holder import holder_of, holder_of_socket
from magi_agent.servers.program_faults import program_fault
from magi_agent.servers.reach import AtPort, AtSocket, Reach
from magi_agent.servers.readiness import LoadProgress
from magi_agent.servers.survivors import survived
from magi_agent.systemd.errors import BusError, JournalError
from magi_agent.systemd.journal import Journal, Selection
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus

_SUFFIX: Final = ".service"
_ANSWER_WAIT: Final = 5.0
_KERNEL_LOG_SPAN: Final = 60.0
"""Seconds of the kernel's log, before the end of a server, in which it is looked for what the kernel killed."""
_OOM_KILL: Final = re.compile(
    r"oom-kill:constraint=.*?(?:,oom_memcg=(?P<limit>[^,]*)|,global_oom),task_memcg=[^,]*/(?P<unit>[^/,]+),"
)
"""A line of the kernel's mm/oom_kill.c (dump_oom_summary); the first group is there where it is a group's limit."""
_JOURNAL_PAUSES: Final = (0.1, 0.3, 0.8, 1.2, 0.0)
"""Seconds between looks for what the journal does not have yet; on a busy host, it has been seen to be late by more
than one."""


class UnitEvidence:
    """Asks the kernel, systemd and the journal."""

    def __init__(self, manager: SystemdManager, journal: Journal) -> None:
        self._manager = manager
        self._journal = journal

    async def is_its_own(self, unit: UnitStatus, reach: Reach) -> bool | None:
        """Whether it is the unit's own processes that listen there; ``None`` where the kernel does not tell."""
        match reach:
            case AtPort(host, port):
                return owned_by(port, unit.control_group, host)
            case AtSocket(path):
                owned = unix_owned_by(path, unit.control_group)
                if owned is None and (listener := unix_listener(path)):
                    # The kernel does tell the process; one of the unit's there is that systemd knows.
                    return listener.pid == unit.main_pid
                return owned

    async def holder_of(self, reach: Reach) -> str:
        """Who listens there, in words."""
        match reach:
            case AtPort(port=port):
                return await asyncio.to_thread(holder_of, port)
            case AtSocket(path):
                return await asyncio.to_thread(holder_of_socket, path)

    async def progress(self, unit: UnitStatus) -> LoadProgress:
        """CPU time, memory, and bytes read so far: what loading a model costs, fast or slow."""
        cpu, read = _process_figures(unit.main_pid) if unit.main_pid else (None, None)
        try:
            async with asyncio.timeout(_ANSWER_WAIT):
                accounting = await self._manager.read_accounting(unit.name)
        except (BusError, TimeoutError):
            return LoadProgress(cpu, read)
        if accounting.cpu_usage_nsec is not None:
            cpu = accounting.cpu_usage_nsec / 1e9
        return LoadProgress(cpu, read, accounting.memory_current)

    async def program_fault(self, unit: UnitStatus) -> Diagnosis | None:
        """Why the unit's program cannot be executed, where its file tells."""
        return await asyncio.to_thread(program_fault, Path(unit.argv[0])) if unit.argv else None

    def survived(self, unit: UnitStatus) -> Failure | None:
        """Why a unit that systemd has given up is not gone; ``None`` where none of its processes is left."""
        return survived(unit.control_group)

    async def memory_end(self, unit: UnitStatus) -> MemoryEnd:
        """At which limit the unit's last run was killed for memory, as far as systemd and the kernel's log tell."""
        limit = group = None
        with contextlib.suppress(BusError, TimeoutError):
            async with asyncio.timeout(_ANSWER_WAIT):
                _, limit = await self._manager.memory_limits_of_service(unit.name)
        with contextlib.suppress(JournalError, TimeoutError):
            async with asyncio.timeout(_ANSWER_WAIT):
                group = await self._group_out_of_memory(unit)
        chosen = set_memory_limits_of(unit.environment)
        made_with = memory_limits_of(unit.environment) or chosen
        return MemoryEnd(limit, group, source_of(limit, chosen.max, made_with.max))

    async def _group_out_of_memory(self, unit: UnitStatus) -> str | None:
        ended = unit.exec_main_exit_timestamp or time.time()
        kernel = Selection(any_of=[["_TRANSPORT=kernel"]], since=ended - _KERNEL_LOG_SPAN)
        for pause in _JOURNAL_PAUSES:
            async with contextlib.aclosing(self._journal.newest(kernel)) as entries:
                async for entry in entries:
                    if (killed := _OOM_KILL.match(entry.message)) and killed["unit"] == unit.name:
                        return PurePosixPath(killed["limit"] or "/").name
            await asyncio.sleep(pause)
        return None

    async def last_log_lines(self, unit: UnitStatus) -> tuple[str, ...]:
        """The last lines of the unit's last run, as many as tell why it ended."""
        for pause in _JOURNAL_PAUSES:
            entries = await self._journal.read_last(
                unit.name.removesuffix(_SUFFIX), lines=READ_LINES, invocation_id=unit.invocation_id or None
            )
            if entries:
                return tuple(entry.message for entry in entries)
            # What a process said right before its end reaches the journal a moment after systemd told of the end.
            await asyncio.sleep(pause)
        return ()


def _process_figures(pid: int) -> tuple[float | None, int | None]:
    """CPU seconds and bytes read of one process, as far as this user may know them."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        try:
            read = process.io_counters().read_bytes
        except psutil.AccessDenied:
            read = None
    except psutil.Error:
        return None, None
    return times.user + times.system, read
