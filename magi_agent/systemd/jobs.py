"""Jobs of systemd's queue: what became of them.

systemd says by the signal ``JobRemoved`` how a job ended. The signal may come before the answer that names the job,
it may come twice, and most of those that come are about other people's jobs.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from magi_agent.systemd.errors import BusError

_REMEMBERED: Final = 256


class JobResult(StrEnum):
    """How a job ended, in systemd's words."""

    DONE = "done"
    CANCELED = "canceled"
    TIMEOUT = "timeout"
    FAILED = "failed"
    DEPENDENCY = "dependency"
    SKIPPED = "skipped"
    INVALID = "invalid"
    ASSERT = "assert"
    UNSUPPORTED = "unsupported"
    COLLECTED = "collected"
    ONCE = "once"
    OTHER = "other"
    """A word that this version of the agent does not know."""

    @classmethod
    def _missing_(cls, value: object) -> "JobResult":  # noqa: ARG003  # the enumeration's signature
        return cls.OTHER

    @property
    def ok(self) -> bool:
        """Whether the unit is now in the state that was asked for."""
        return self in {JobResult.DONE, JobResult.SKIPPED}


class Jobs:
    """Waits for jobs by their object paths."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[JobResult]] = {}
        self._ended: OrderedDict[str, JobResult] = OrderedDict()

    def expect(self, path: str) -> asyncio.Future[JobResult]:
        """Return the future result of the job ``path``, which may have ended already.

        It fails with a ``BusError`` when the connection is lost first. Whoever gives up waiting calls ``forget``.
        """
        future: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        result = self._ended.pop(path, None)
        if result is not None:
            future.set_result(result)
        else:
            self._waiting[path] = future
        return future

    def forget(self, path: str) -> None:
        """Wait no longer for the job ``path``."""
        self._waiting.pop(path, None)

    def removed(self, path: str, result: str) -> None:
        """Take note that systemd removed the job ``path`` with ``result``."""
        future = self._waiting.pop(path, None)
        if future is not None:
            if not future.done():
                future.set_result(JobResult(result))
            return
        self._ended[path] = JobResult(result)
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def fail_all(self, error: Callable[[], BusError]) -> None:
        """Fail everyone who waits: nobody will tell them any more. A new connection starts without a memory."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error())
        self._waiting.clear()
        self._ended.clear()
