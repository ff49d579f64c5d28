"""The facts of model files by their paths, read once for each state of a file.

A file system that does not answer holds up nobody for long: the reading goes on in a thread of its own, and who asks
meanwhile waits for the same one.
"""

import asyncio
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Final

from magi_agent.daemon_thread import in_daemon_thread
from magi_agent.gguf.errors import GgufError
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.gguf.reading import read_facts
from magi_agent.memory.need import NeedUnknown

_MOST_KEPT: Final = 1024
_MOST_READING: Final = 64
"""Files that are being read at a time, or whose file system does not answer."""
_PATIENCE: Final = 5.0
"""Seconds that who asks waits for a file system."""
_Known = tuple[tuple[int, int, int, int], HeaderFacts]


class FileFacts:
    """Reads headers when they are asked for. Used from one event loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._reading: dict[str, asyncio.Task[_Known]] = {}

    async def of(self, path: str) -> HeaderFacts:
        """The facts of a file as it is now. Raises ``NeedUnknown`` where it cannot be read, or not in time."""
        reading = self._reading.get(path)
        if reading is None:
            if len(self._reading) >= _MOST_READING:
                raise NeedUnknown(f"{len(self._reading)} other files are being read; ask again")
            known = self._known.get(path)
            reading = asyncio.create_task(in_daemon_thread(partial(_read, path, known), "facts of a file"))
            self._reading[path] = reading
            reading.add_done_callback(partial(self._ended, path))
        try:
            async with asyncio.timeout(_PATIENCE):
                _, facts = await asyncio.shield(reading)
        except TimeoutError:
            raise NeedUnknown(f"the file system of {path} does not answer") from None
        return facts

    async def close(self) -> None:
        """Wait for no file system any longer."""
        tasks = list(self._reading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, path: str, reading: asyncio.Task[_Known]) -> None:
        del self._reading[path]
        # Asked for here, so that nobody is told of a fault that nobody waits for any more.
        if reading.cancelled() or reading.exception() is not None:
            return
        self._known[path] = reading.result()
        self._known.move_to_end(path)
        while len(self._known) > _MOST_KEPT:
            self._known.popitem(last=False)


def _read(path: str, known: _Known | None) -> _Known:
    """A file's identity and facts, read if it is another than the known one. Raises ``NeedUnknown``."""
    try:
        status = Path(path).stat()
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if known is not None and known[0] == identity:
            return known
        return identity, read_facts(path)
    except GgufError as error:
        raise NeedUnknown(f"the header of {path} cannot be used: {error}") from None
    except OSError as error:
        raise NeedUnknown(f"{path} cannot be read: {error.strerror}") from None
