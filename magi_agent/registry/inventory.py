"""Keeping the registry in step with the model folders.

One loop owns the scanner. Events of the folder watch only make some paths due; what is in the registry always comes
from looking at the files. A path is looked at when it is first heard of, and then again once it has been quiet for a
moment, so a copy of forty gigabytes costs two looks and not one a write. A whole scan, once in a while and after any
doubt, is the truth.

::

    folder watch ──paths──▶ due ──┐
    unsettled files ──────▶ due ──┼──▶ scanner (in a thread) ──facts──▶ registry
    doubt, interval, POST /rescan ┘
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.scanner import FolderProblem, Scanner, ScanResult
from magi_agent.discovery.watching import FolderWatch
from magi_agent.errors import MagiError, RegistrySaveFailed, RescanFailed
from magi_agent.registry.merging import Merge
from magi_agent.registry.registry import Registry

_LOG: Final = logging.getLogger(__name__)
_QUIET: Final = 0.2
"""Seconds without a further event after which a file that was written to is looked at again."""
_FORGET_BUSY: Final = 5.0
"""Seconds after which a path counts as heard of for the first time again."""
_MAX_DUE: Final = 4096
"""With more paths due at once, a whole scan is cheaper than each of them."""
_FIRST_RECHECK: Final = 1.0
_LONGEST_RECHECK: Final = 30.0


@dataclass(frozen=True, slots=True)
class Rescan:
    """What a whole scan found."""

    models_found: int
    models_added: int
    models_removed: int
    at: datetime


class Inventory:
    """Scans, listens, and hands the registry what it finds."""

    def __init__(
        self, scanner: Scanner, registry: Registry, running: Callable[[], Collection[str]], interval: float
    ) -> None:
        """``running`` gives the ids of models whose servers run; ``interval`` is in seconds."""
        self._scanner = scanner
        self._registry = registry
        self._running = running
        self._interval = interval
        self._watch = FolderWatch(scanner.folders, self._heard, self._doubt)
        self._one_look = asyncio.Lock()
        self._wake = asyncio.Event()
        self._due: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._unsettled: tuple[str, ...] = ()
        self._merged: tuple[ModelFacts, ...] | None = None
        """What the registry was handed last; the scanner gives the same object while nothing changes."""
        self._recheck_at: float | None = None
        self._recheck_pause = _FIRST_RECHECK
        self._scan_at = 0.0
        self._said: frozenset[FolderProblem] = frozenset()
        self.problems: tuple[FolderProblem, ...] = ()
        """Folders and files that could not be looked at, as of the last look."""
        self.scanning = True
        """Whether the first scan is still to be finished."""

    async def run(self) -> None:
        """Keep the registry in step until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run(), name="folder-watch")
            tasks.create_task(self._look_when_due(), name="inventory")

    async def rescan(self) -> Rescan:
        """Scan everything now.

        Raises ``RescanFailed`` where no folder could be looked at, or the registry not be saved; in the first case
        the registry stays as it was.
        """
        async with self._one_look:
            result, merged = await self._scan()
        return Rescan(len(result.models), len(merged.added), len(merged.removed), datetime.now(UTC))

    def look_again(self) -> None:
        """Have everything scanned soon: something that decides what is listed has changed."""
        self._doubt()

    async def _scan(self) -> tuple[ScanResult, Merge]:
        now = asyncio.get_running_loop().time()
        self._scan_at = now + self._interval
        self._due.clear()
        try:
            result = await asyncio.to_thread(self._scanner.scan)
            self._take(result)
            unusable = {problem.path: problem.message for problem in result.problems}
            failed = [folder for folder in self._scanner.folders if folder in unusable]
            if len(failed) == len(self._scanner.folders):
                reasons = "; ".join(f"{folder}: {unusable[folder]}" for folder in failed)
                raise RescanFailed(
                    f"no model folder could be scanned: {reasons}", {"folders": {f: unusable[f] for f in failed}}
                )
            try:
                merged = await self._registry.merge(result.models, self._running())
            except RegistrySaveFailed as error:
                raise RescanFailed(error.message, error.details) from None
        finally:
            self.scanning = False
        self._merged = result.models
        if merged.is_news:
            _say_news(merged, result)
        return result, merged

    async def _look_when_due(self) -> None:
        while True:
            self._wake.clear()
            loop = asyncio.get_running_loop()
            now = loop.time()
            try:
                async with self._one_look:
                    if now >= self._scan_at or len(self._due) > _MAX_DUE:
                        await self._scan()
                    elif paths := self._take_due(now):
                        await self._refresh(paths)
            except MagiError as error:
                _LOG.error("%s", error)
            waits = [self._scan_at, *self._due.values()]
            if self._recheck_at is not None:
                waits.append(self._recheck_at)
            pause = min(waits) - loop.time()
            if pause <= 0:
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _take_due(self, now: float) -> set[str]:
        paths = {path for path, at in self._due.items() if at <= now}
        for path in paths:
            del self._due[path]
            self._busy[path] = now
        for path in [path for path, at in self._busy.items() if at < now - _FORGET_BUSY]:
            del self._busy[path]
        if self._recheck_at is not None and self._recheck_at <= now:
            paths.update(self._unsettled)
            self._recheck_at = None
        return paths

    async def _refresh(self, paths: Iterable[str]) -> None:
        result = await asyncio.to_thread(self._scanner.refresh, paths)
        self._take(result)
        if result.models is self._merged:
            return
        merged = await self._registry.merge(result.models, self._running())
        self._merged = result.models
        if merged.is_news:
            _say_news(merged, result)

    def _take(self, result: ScanResult) -> None:
        """Note what a look could not settle, and say what is newly wrong."""
        self.problems = result.problems
        for problem in set(result.problems) - self._said:
            _LOG.warning("%s: %s", problem.path.encode(errors="replace").decode(), problem.message)
        self._said = frozenset(result.problems)
        if result.unsettled != self._unsettled:
            self._recheck_pause = _FIRST_RECHECK
        self._unsettled = result.unsettled
        if not result.unsettled:
            self._recheck_at = None
        elif self._recheck_at is None:
            self._recheck_at = asyncio.get_running_loop().time() + self._recheck_pause
            self._recheck_pause = min(self._recheck_pause * 2, _LONGEST_RECHECK)

    def _heard(self, paths: frozenset[str]) -> None:
        now = asyncio.get_running_loop().time()
        for path in paths:
            self._due[path] = now + _QUIET if path in self._busy or path in self._due else now
            if path in self._busy:
                self._busy[path] = now
        self._wake.set()

    def _doubt(self) -> None:
        self._scan_at = 0.0
        self._wake.set()


def _say_news(merged: Merge, result: ScanResult) -> None:
    _LOG.info(
        "%d models found (%d new, %d changed, %d gone) in %.2f s, %d headers read",
        len(result.models),
        len(merged.added),
        len(merged.changed),
        len(merged.removed),
        result.duration,
        result.headers_read,
    )
