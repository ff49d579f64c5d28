"""Which file systems answer.

A network file system whose server is away lets every call wait, for minutes or for ever, and nothing ends the wait. So
whoever looks at many folders in one thread asks each such file system first, in a thread of the question's own, and
leaves those out that do not answer in time.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from magi_agent.discovery.file_systems import MountTable
from magi_agent.discovery.folders import is_within, join

_PATIENCE: Final = 2.0
"""Seconds that a file system has to answer."""


class Whereabouts:
    """What is being looked at, and since when: written by the thread that looks, read by others."""

    def __init__(self) -> None:
        self._now: tuple[str, float] | None = None

    def at(self, path: str | None) -> None:
        """Note that ``path`` is looked at from now on; ``None``: nothing is."""
        self._now = None if path is None else (path, time.monotonic())

    def waiting(self, longer_than: float) -> Iterator[tuple[str, float]]:
        """The path that has been looked at for longer than some seconds, if there is one, and for how many."""
        now = self._now
        if now is not None and (seconds := time.monotonic() - now[1]) > longer_than:
            yield now[0], seconds


class _Question:
    """One call to a file system that may not come back."""

    def __init__(self, path: str) -> None:
        self.asked_at = time.monotonic()
        self.answered = threading.Event()
        self._path = path
        threading.Thread(target=self._ask, name=f"does {path} answer", daemon=True).start()

    def _ask(self) -> None:
        try:
            # Unlike a file's state, this is asked of the server each time (NFS, SMB, FUSE).
            os.statvfs(self._path)
        except OSError:
            pass  # an answer, too; what it means is for the look to say
        finally:
            self.answered.set()


class AnsweringFileSystems:
    """Asks the file systems of some folders that change without being heard of; one question each at a time.

    To be used from one thread at once.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Question] = {}

    def silent(self, roots: Sequence[str]) -> Mapping[str, float]:
        """The folders, configured ones or below them, that do not answer, and when they were asked (monotonic)."""
        asked = dict.fromkeys(self._to_be_asked(roots))
        self._open = {path: question for path, question in self._open.items() if path in asked}
        new = [path for path in asked if path not in self._open]
        self._open.update({path: _Question(path) for path in new})
        deadline = time.monotonic() + _PATIENCE
        for path in asked:
            question = self._open[path]
            # One that was waited for before is not waited for again.
            if question.answered.wait(max(0, deadline - time.monotonic()) if path in new else 0):
                del self._open[path]
        return {path: question.asked_at for path, question in self._open.items()}

    @staticmethod
    def _to_be_asked(roots: Iterable[str]) -> Iterator[str]:
        table = MountTable.now()
        for root in roots:
            real = table.resolve(root)
            if not table.is_heard(real):
                yield root
                continue
            for point in table.unheard_points():
                if is_within(point, real):
                    yield join(root, point[len(real) :].lstrip("/"))
