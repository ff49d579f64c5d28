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

A file system may not answer. Whoever asks for a scan waits for it so long and no longer, and the scan goes on; the
thread that hangs in it keeps nobody from ending the process.
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

from magi_agent.daemon_thread import in_daemon_thread
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
_RESCAN_WAIT: Final = 60.0
"""Seconds that who asks for a scan waits for it, unless told otherwise."""
_HANGS: Final = 5.0
"""Seconds with one file or folder after which that is told as a problem."""
_MOST_PROBLEMS: Final = 100
_MOST_LINES: Final = 20
"""Of problems at once in the journal."""


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


@dataclass(slots=True)
class ScanCounts:
    """The whole scans since the start."""

    succeeded: int = 0
    failed: int = 0
    last_seconds: float | None = None
    """How long the last one took that could look at the folders."""


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
        self._failed: str | None = None
        """What the last look failed with; said once."""
        self._failure_pause = _POLL
        self._asked: asyncio.Task[Rescan] | None = None
        """A scan that was asked for and has not begun: who asks meanwhile waits for the same."""
        self._rescans: set[asyncio.Task[Rescan]] = set()
        self._said: frozenset[FolderProblem] = frozenset()
        self._silent: Mapping[str, float] = {}
        self._problems: tuple[FolderProblem, ...] = ()
        self._problems_left_out = 0
        self.scanning = True
        """Whether the first scan is still to be finished."""
        self.scans = ScanCounts()

    @property
    def problems(self) -> tuple[FolderProblem, ...]:
        """Folders and files that could not be looked at, as of the last look, and what is waited for now.

        The first hundred of them, and how many more.
        """
        now = time.monotonic()
        silent = {path: now - since for path, since in self._silent.items()}
        silent.update(self._scanner.whereabouts.waiting(_HANGS))
        waits = [FolderProblem(path, f"it has not answered for {seconds:.0f} s") for path, seconds in silent.items()]
        more = self._problems_left_out
        rest = [FolderProblem("model folders", f"{more} more problems")] if more else []
        return (*waits, *self._problems, *rest)

    @property
    def problem_count(self) -> int:
        """How many folders and files could not be looked at, as of the last look."""
        return len(self._silent) + len(self._problems) + self._problems_left_out

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

    async def close(self) -> None:
        """Give up the scans that were asked for and are not through."""
        for task in self._rescans:
            task.cancel()
        await asyncio.gather(*self._rescans, return_exceptions=True)

    async def rescan(self, within: float | None = _RESCAN_WAIT) -> Rescan:
        """Scan everything now, and wait for it for so many seconds; it goes on after these.

        Raises ``RescanFailed`` where it takes longer, no folder could be looked at, or the registry not be saved; in
        the first two cases the registry stays as it was, for the time being.
        """
        if self._asked is None:
            self._asked = asyncio.create_task(self._scan_as_asked(), name="rescan")
            self._rescans.add(self._asked)
            self._asked.add_done_callback(self._rescans.discard)
        task = self._asked
        try:
            await asyncio.wait([task], timeout=within)
        finally:
            if not task.done():
                task.add_done_callback(self._ended_unheard)
        if not task.done():
            waits = ", ".join(path for path, _ in self._scanner.whereabouts.waiting(0)) or "another scan"
            raise RescanFailed(
                f"the scan goes on, but was not through within {within:.0f} s; it waits for {waits}",
                {"waitsFor": waits},
            )
        return task.result()

    async def _scan_as_asked(self) -> Rescan:
        async with self._one_look:
            self._asked = None
            result, merged = await self._scan()
        return Rescan(len(result.models), len(merged.added), len(merged.removed), datetime.now(UTC))

    def _ended_unheard(self, task: asyncio.Task[Rescan]) -> None:
        """Say why a scan failed for which nobody waits any more."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("%s", error)

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
            result, used = await in_daemon_thread(partial(_timed, self._scanner.scan), "scan")
            # Headers are read once; what a scan costs again and again is the rest.
            self._scan_cost = used if result.headers_read == 0 else min(used, self._scan_cost)
            self._doubt_from = loop.time() + self._scan_cost / _POLL_SHARE
            self._take(result)
            self.scans.last_seconds = result.duration
            self._require_a_folder(result)
            try:
                merged = await self._registry.merge(result.models, self._running(), result.devices)
            except RegistrySaveFailed as error:
                raise RescanFailed(error.message, error.details) from None
        except MagiError:
            self.scans.failed += 1
            raise
        finally:
            self.scanning = False
        self.scans.succeeded += 1
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
        roots = frozenset(self._scanner.folders)
        unusable = dict.fromkeys(result.silent, "it does not answer")
        unusable.update({problem.path: problem.message for problem in result.problems if problem.path in roots})
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
                        self._failed, self._failure_pause = None, _POLL
                    elif paths := self._take_due(now):
                        await self._refresh(paths)
                    elif now >= self._poll_at and self._watch.unheard:
                        await self._poll()
            except MagiError as error:
                self._note_failure(error)
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
        used = 0.0
        try:
            used = await self._refresh(self._watch.unheard)
        finally:
            end = loop.time()
            # One that does not answer is not waited for again, and is to be seen soon once it does.
            waited = 0.0 if self._silent else end - begin
            pause = max(_POLL, used / _POLL_SHARE, waited / _POLL_WAITING_SHARE)
            self._poll_at = end + min(pause, self._interval)

    def _note_failure(self, error: MagiError) -> None:
        """Say it, but the same only once, and look again after ever longer whiles."""
        sentence = str(error)
        if sentence != self._failed:
            _LOG.error("%s", sentence)
            self._failed = sentence
        again_at = asyncio.get_running_loop().time() + self._failure_pause
        self._failure_pause = min(2 * self._failure_pause, self._interval)
        self._doubt_from = max(self._doubt_from, again_at)
        self._poll_at = max(self._poll_at, again_at)
        # What could not be saved is still to be.
        self._scan_at = again_at

    async def _refresh(self, paths: Iterable[str]) -> float:
        """Look at some paths, and return the processor's time that took, in seconds."""
        result, used = await in_daemon_thread(partial(_timed, partial(self._scanner.refresh, paths)), "refresh")
        self._take(result)
        if result.models is self._merged:
            return used
        self._require_a_folder(result)
        merged = await self._registry.merge(result.models, self._running(), result.devices)
        self._merged = result.models
        if merged.is_news:
            _say_news(merged, result)
        return used

    def _take(self, result: ScanResult) -> None:
        """Note what a look could not settle, say what is newly wrong, and have watched what there is."""
        self._growing, self._folders = result.growing, result.folders
        self._watch.follow(result.folders, result.growing)
        self._say_problems(result)
        if result.unsettled != self._unsettled:
            self._recheck_pause = _FIRST_RECHECK
        self._unsettled = result.unsettled
        if not result.unsettled:
            self._recheck_at = None
        elif self._recheck_at is None:
            self._recheck_at = asyncio.get_running_loop().time() + self._recheck_pause
            self._recheck_pause = min(self._recheck_pause * 2, _LONGEST_RECHECK)

    def _say_problems(self, result: ScanResult) -> None:
        self._silent = result.silent
        self._problems = result.problems[:_MOST_PROBLEMS]
        self._problems_left_out = len(result.problems) - len(self._problems)
        told = (*(FolderProblem(path, "its file system does not answer") for path in result.silent), *self._problems)
        news = [problem for problem in told if problem not in self._said]
        self._said = frozenset(told)
        for problem in news[:_MOST_LINES]:
            _LOG.warning("%s: %s", problem.path.encode(errors="replace").decode(), problem.message)
        more = len(news) - _MOST_LINES + self._problems_left_out
        if len(news) > _MOST_LINES:
            _LOG.warning("and %d more problems in the model folders", more)

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
