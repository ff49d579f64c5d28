"""Keeping the registry in step with the model folders.

One loop owns the scanner. Events of the folder watch only make some paths due; what is in the registry always comes
from looking at the files. A path is looked at when it is first heard of; while it keeps being written to, after ever
longer whiles; and once it has been quiet for a moment. A file whose header says how long it will be is not even heard
of before it is, so a copy of forty gigabytes costs some three looks and not one a write. Folders that cannot be heard
of are looked at every few seconds, for one part in a hundred of a processor at most. A whole scan, once in a while and
after any doubt, is the truth.

::

    folder watch ──paths──▶ due ──┐
    unsettled files ──────▶ due ──┤
    unheard folders ──────▶ due ──┼──▶ scanner (in a thread) ──facts──▶ registry
    doubt, interval, POST /rescan ┘
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from magi_agent.discovery.facts import ModelFacts, TierThresholds
from magi_agent.discovery.scanner import FolderProblem, Scanner, ScanResult
from magi_agent.discovery.watching import FolderWatch
from magi_agent.errors import MagiError, RegistrySaveFailed, RescanFailed
from magi_agent.registry.merging import Merge
from magi_agent.registry.registry import Registry

_LOG: Final = logging.getLogger(__name__)
_QUIET: Final = 1.0
"""Seconds without a further event after which a path that is heard of again and again is looked at."""
_FIRST_GAP: Final = 0.2
_LONGEST_GAP: Final = 30.0
"""Seconds between two looks at a file that is never quiet, at first and at most."""
_FORGET_BUSY: Final = 5.0
"""Seconds after which a path counts as heard of for the first time again."""
_MAX_DUE: Final = 4096
"""With more paths due at once, a whole scan is cheaper than each of them."""
_FIRST_RECHECK: Final = 1.0
_LONGEST_RECHECK: Final = 30.0
_POLL: Final = 2.0
"""Seconds between two looks at folders that are not heard of, at least, and at one that is never quiet, at most."""
_POLL_SHARE: Final = 0.01
"""Of a processor, at most, for these looks and for scans after doubts."""
_POLL_WAITING_SHARE: Final = 0.1
"""Of the time, at most, that these looks wait for a network file system."""


@dataclass(slots=True)
class _Busy:
    """A path that was looked at because something was heard of it."""

    looked_at: float
    heard_at: float
    gap: float = _FIRST_GAP  # seconds before the next look, if it keeps being heard of


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
        self._busy: dict[str, _Busy] = {}
        self._growing: Mapping[str, int] = {}
        self._folders: Collection[str] = ()
        self._unsettled: tuple[str, ...] = ()
        self._merged: tuple[ModelFacts, ...] | None = None
        """What the registry was handed last; the scanner gives the same object while nothing changes."""
        self._recheck_at: float | None = None
        self._recheck_pause = _FIRST_RECHECK
        self._scan_at = 0.0
        self._doubted = False
        self._doubt_from = 0.0
        """When a doubt may cause a scan again."""
        self._scan_cost = 0.0
        self._poll_at = 0.0
        self._said: frozenset[FolderProblem] = frozenset()
        self.problems: tuple[FolderProblem, ...] = ()
        """Folders and files that could not be looked at, as of the last look."""
        self.scanning = True
        """Whether the first scan is still to be finished."""

    def reconfigure(self, folders: Sequence[Path], thresholds: TierThresholds, interval: float) -> None:
        """Take other folders and thresholds from the next whole scan on, and another interval from now on."""
        self._scanner.reconfigure(folders, thresholds)
        self._watch.reconfigure([str(folder) for folder in folders])
        self._interval = interval
        self._scan_at = min(self._scan_at, asyncio.get_running_loop().time() + interval)
        self._wake.set()

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
        self._doubt_from = 0.0
        self._doubt()

    async def _scan(self) -> tuple[ScanResult, Merge]:
        loop = asyncio.get_running_loop()
        self._scan_at = loop.time() + self._interval
        unheard_of = not self._doubted and not self._due
        self._doubted = False
        self._due.clear()
        try:
            result, used = await asyncio.to_thread(_timed, self._scanner.scan)
            # Headers are read once; what a scan costs again and again is the rest.
            self._scan_cost = used if result.headers_read == 0 else min(used, self._scan_cost)
            self._doubt_from = loop.time() + self._scan_cost / _POLL_SHARE
            self._take(result)
            self._require_a_folder(result)
            try:
                merged = await self._registry.merge(result.models, self._running())
            except RegistrySaveFailed as error:
                raise RescanFailed(error.message, error.details) from None
        finally:
            self.scanning = False
        if unheard_of and self._merged is not None and merged.is_news:
            self._watch.begin_anew()
        self._merged = result.models
        if merged.is_news:
            _say_news(merged, result)
        return result, merged

    def _require_a_folder(self, result: ScanResult) -> None:
        """See that anything could be looked at: where nothing could, nothing is known of what went.

        Raises ``RescanFailed``.
        """
        unusable = {problem.path: problem.message for problem in result.problems}
        failed = [folder for folder in self._scanner.folders if folder in unusable]
        if len(failed) == len(self._scanner.folders):
            reasons = "; ".join(f"{folder}: {unusable[folder]}" for folder in failed)
            raise RescanFailed(
                f"no model folder could be scanned: {reasons}", {"folders": {f: unusable[f] for f in failed}}
            )

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
                    elif now >= self._poll_at and self._watch.unheard:
                        await self._poll()
            except MagiError as error:
                _LOG.error("%s", error)
            waits = [self._scan_at, *self._due.values()]
            if self._recheck_at is not None:
                waits.append(self._recheck_at)
            if self._watch.unheard:
                waits.append(self._poll_at)
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
            busy = self._busy.get(path)
            longest = _LONGEST_GAP if path not in self._folders else _POLL
            gap = min(2 * busy.gap, longest) if busy else _FIRST_GAP
            self._busy[path] = _Busy(now, busy.heard_at if busy else now, gap)
        old = now - _FORGET_BUSY
        for path in [path for path, busy in self._busy.items() if busy.heard_at < old and busy.looked_at < old]:
            del self._busy[path]
        if self._recheck_at is not None and self._recheck_at <= now:
            paths.update(self._unsettled)
            self._recheck_at = None
        return paths

    async def _poll(self) -> None:
        """Look at the folders that cannot be heard of, and not so soon again if that is dear."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        used = await self._refresh(self._watch.unheard)
        end = loop.time()
        pause = max(_POLL, used / _POLL_SHARE, (end - begin) / _POLL_WAITING_SHARE)
        self._poll_at = end + min(pause, self._interval)

    async def _refresh(self, paths: Iterable[str]) -> float:
        """Look at some paths, and return the processor's time that took, in seconds."""
        result, used = await asyncio.to_thread(_timed, partial(self._scanner.refresh, paths))
        self._take(result)
        if result.models is self._merged:
            return used
        self._require_a_folder(result)
        merged = await self._registry.merge(result.models, self._running())
        self._merged = result.models
        if merged.is_news:
            _say_news(merged, result)
        return used

    def _take(self, result: ScanResult) -> None:
        """Note what a look could not settle, say what is newly wrong, and have watched what there is."""
        self._growing, self._folders = result.growing, result.folders
        self._watch.follow(result.folders, result.growing)
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
            busy = self._busy.get(path)
            if busy is None or path in self._growing:
                self._due[path] = now
            else:
                busy.heard_at = now
                self._due[path] = max(now, min(busy.looked_at + busy.gap, now + _QUIET))
        self._wake.set()

    def _doubt(self) -> None:
        now = asyncio.get_running_loop().time()
        self._doubted = True
        self._scan_at = min(self._scan_at, max(now, min(self._doubt_from, now + self._interval)))
        self._wake.set()


def _timed(look: Callable[[], ScanResult]) -> tuple[ScanResult, float]:
    """Return the result and the processor's time that it took, in seconds."""
    begin = time.thread_time()
    result = look()
    return result, time.thread_time() - begin


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
