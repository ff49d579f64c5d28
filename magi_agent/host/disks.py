"""The file systems that folders are on."""

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from magi_agent.daemon_thread import in_daemon_thread

_SECONDS: Final = 2.0
"""For each folder: a network file system whose server is away does not answer."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of one folder, in bytes; where ``problem`` says why it is not known, the rest is ``None``."""

    folder: Path
    total: int | None
    free: int | None
    """To users that are not root."""
    problem: str | None


class Disks:
    """Looks at folders; one that hangs is asked again only when it has answered."""

    def __init__(self) -> None:
        self._asking: dict[Path, asyncio.Task[os.statvfs_result]] = {}

    async def look(self, folders: Iterable[Path]) -> tuple[Disk, ...]:
        """How full each is."""
        return tuple(await asyncio.gather(*(self._look(folder) for folder in dict.fromkeys(folders))))

    async def close(self) -> None:
        """Wait for nobody any more."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def _look(self, folder: Path) -> Disk:
        task = self._asking.get(folder)
        if task is None:
            task = asyncio.create_task(in_daemon_thread(partial(os.statvfs, folder), f"disk of {folder}"))
            self._asking[folder] = task
        done, _ = await asyncio.wait({task}, timeout=_SECONDS)
        if not done:
            return Disk(folder, None, None, f"the file system of {folder} does not answer")
        if self._asking.get(folder) is task:
            del self._asking[folder]
        if task.cancelled():
            return Disk(folder, None, None, "the agent is stopping")
        error = task.exception()
        if isinstance(error, OSError):
            return Disk(folder, None, None, f"{folder}: {error.strerror}")
        status = task.result()
        return Disk(folder, status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize, None)
