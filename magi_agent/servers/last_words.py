"""What a server said last, and what that means: read when it has failed."""

import asyncio
import logging
from dataclasses import replace
from typing import Final, Protocol

from magi_agent.errors import MagiError
from magi_agent.servers.diagnosis import Diagnosis, MemoryEnd, diagnosed
from magi_agent.servers.failure import LOG_LINES, NOT_EXECUTED, Failure
from magi_agent.systemd.status import UnitStatus

_LOG: Final = logging.getLogger(__name__)
_LOG_WAIT: Final = 3.5
"""Seconds that a failure waits to be told with the lines of its log."""


class EndEvidence(Protocol):
    """What can be found out about a unit that has ended."""

    async def last_log_lines(self, unit: UnitStatus) -> tuple[str, ...]:
        """The last lines the unit wrote to the journal, as many as tell why it ended. Raises ``MagiError``."""

    async def memory_end(self, unit: UnitStatus) -> MemoryEnd:
        """At which limit the unit's last run was killed for memory."""

    async def program_fault(self, unit: UnitStatus) -> Diagnosis | None:
        """Why the unit's program cannot be executed, where its file tells."""


class LastWords:
    """Adds to failures what their servers said last."""

    def __init__(self, evidence: EndEvidence) -> None:
        self._evidence = evidence

    async def explained(self, model_id: str, failure: Failure, unit: UnitStatus) -> Failure:
        """A failure with the last lines of its log and, where the cause is a known one, that and what to do."""
        lines = await self._lines(unit)
        program = await self._evidence.program_fault(unit) if failure.exit_status == NOT_EXECUTED else None
        memory = await self._evidence.memory_end(unit) if failure.result == "oom-kill" else None
        return replace(diagnosed(failure, lines, model_id, program, memory), log_lines=lines[-LOG_LINES:])

    async def quoted(self, failure: Failure, unit: UnitStatus) -> Failure:
        """A failure with the last lines of its log, which are no cause: what runs has not said anything last."""
        return replace(failure, log_lines=(await self._lines(unit))[-LOG_LINES:])

    async def _lines(self, unit: UnitStatus) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(_LOG_WAIT):
                return await self._evidence.last_log_lines(unit)
        except (MagiError, TimeoutError) as error:
            _LOG.warning("the last log lines of %s could not be read: %s", unit.name, error)
            return ()
