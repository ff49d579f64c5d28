"""Hearing of changes below some folders: hints, by inotify.

This is the only module that imports watchfiles. What it says is never the whole truth: events get lost when the
kernel's queue overflows, inotify is silent on network file systems, a folder that is moved in reports itself only,
and one file name that is not UTF-8 ends the watch. So every doubt (a watch that begins, ends or begins again) is told
as one, and whoever listens scans then, and once in a while anyway.

watchfiles walks the whole tree when a watch begins, so all of it happens in a thread of its own.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import watchfiles

_LOG: Final = logging.getLogger(__name__)
_STEP_MS: Final = 100
"""How long nothing new must happen for a batch to be told; idle, the watch wakes as often as this."""
_BATCH_MS: Final = 1000
"""How long a batch may grow while new paths keep coming."""
_LOOK_AFTER_FOLDERS_MS: Final = 1000
"""How often the folders themselves are looked at: a watch dies silently with its folder."""
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
_NEVER_MODELS: Final = (".part", ".partial", ".incomplete", ".tmp", ".crdownload", ".lock")


class FolderWatch:
    """Watches folders, with all that is below them, until it is stopped; heals itself.

    Both callbacks run in the event loop: ``on_paths`` with the absolute paths of what changed, coalesced;
    ``on_doubt`` when changes may have been missed.
    """

    def __init__(
        self, folders: Sequence[str], on_paths: Callable[[frozenset[str]], None], on_doubt: Callable[[], None]
    ) -> None:
        self._folders = tuple(folders)
        self._on_paths = on_paths
        self._on_doubt = on_doubt
        self._stopping = threading.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._said: str | None = None

    async def run(self) -> None:
        """Watch until cancelled."""
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="folder-watch")
        watching = self._loop.run_in_executor(self._thread, self._watch_for_ever)
        try:
            await asyncio.shield(watching)
        finally:
            self._stopping.set()
            await watching
            self._thread.shutdown(wait=False)

    def _watch_for_ever(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            there = self._there()
            if there:
                if self._watch_once(there):
                    pause = _FIRST_PAUSE
                    continue
                pause = min(pause * 2, _LONGEST_PAUSE)
            self._stopping.wait(pause)

    def _watch_once(self, there: dict[str, tuple[int, int]]) -> bool:
        """Watch until the folders are others than ``there``; whether that, or a stop, was the reason to end."""
        armed = False
        try:
            for batch in watchfiles.watch(
                *there,
                watch_filter=_may_matter,
                debounce=_BATCH_MS,
                step=_STEP_MS,
                stop_event=self._stopping,
                rust_timeout=_LOOK_AFTER_FOLDERS_MS,
                yield_on_timeout=True,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                if not armed:
                    armed = True
                    self._said = None
                    self._tell(self._on_doubt)
                if batch:
                    self._tell(partial(self._on_paths, frozenset(path for _, path in batch)))
                if self._there() != there:
                    break
        except Exception as error:  # noqa: BLE001
            # What watchfiles raises is not closed: OSError, its own errors, and groups of them. Scans go on without it.
            self._say(error)
            self._tell(self._on_doubt)
            return False
        return True

    def _there(self) -> dict[str, tuple[int, int]]:
        """The folders that exist, with what tells each from a later one of the same name."""
        there = {}
        for folder in self._folders:
            try:
                status = os.stat(folder)  # noqa: PTH116  # the path as a string is wanted back
            except OSError:
                continue
            there[folder] = (status.st_dev, status.st_ino)
        return there

    def _say(self, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sentence = f"{type(error).__name__}: {error}"
        if sentence != self._said:
            self._said = sentence
            _LOG.warning("changes in the model folders are not heard of for now, scans go on: %s", sentence)

    def _tell(self, what: Callable[[], None]) -> None:
        if self._loop is not None and not self._stopping.is_set():
            self._loop.call_soon_threadsafe(what)


def _may_matter(_: watchfiles.Change, path: str) -> bool:
    """Whether a path may be a model, a folder, or a download's control file whose end says that the model is there."""
    name = path.rpartition("/")[2]
    return not name.startswith(".") and not name.endswith(_NEVER_MODELS)
