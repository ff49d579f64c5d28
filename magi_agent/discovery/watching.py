"""Hearing of changes in some folders: hints, by inotify.

This is the only module that imports watchfiles. What it says is never the whole truth, and it fails silently in many
ways: it says nothing when the kernel's queue overflows; a watch over a whole tree ends where a folder below may not
be read or vanishes meanwhile, and never learns of a folder whose creation it missed; a watch dies with its folder; one
file name that is not UTF-8 ends all of an instance. So

* each folder that a scan found is watched for itself, and only those: what the watch knows is what the scans know;
* a folder is told as changed when its watch begins, since nothing was heard of it before;
* every doubt is told as one, and whoever listens scans then, and once in a while anyway;
* a folder in which a file has been growing for a while is not watched until that ends, for inotify tells of every
  write; the folder's and the file's states are asked for instead;
* folders that cannot be heard of (``unheard``) are to be looked at again and again instead: those on network file
  systems, those with a name that is not UTF-8 in them, and those for which the kernel has no watch left.

watchfiles holds the interpreter's lock while it sets up its watches. That is why folders on network file systems are
left out, whose server may not answer for minutes, and why an instance has no more than some hundred folders. All of it
happens in a thread of its own. watchfiles can be asked, but does not call; the kernel tells when there may be something
to ask for (``QueuedEvents``). So the thread sleeps while nothing happens, but for looks at the configured folders,
above which nothing is watched: a second after something was different there, and ever more rarely while nothing is.
While something happens, it asks a few times a second and does not listen to the kernel, which tells of every write, and
of every opening of a file. Where the kernel does not tell, it asks a few times a second always.
"""

import asyncio
import logging
import math
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from enum import IntEnum
from functools import partial
from typing import Final

from magi_agent.discovery.file_systems import MOUNTS_PATH, Mount, MountTable
from magi_agent.discovery.growing import GrowingFiles
from magi_agent.discovery.queued_events import QueuedEvents, inotify_descriptors
from magi_agent.parts_of_packages import only_parts_of

# The whole of watchfiles is for programs on anyio, which needs OpenSSL and is not used here.
only_parts_of("watchfiles")

from watchfiles._rust_notify import RustNotify  # noqa: E402  # https://watchfiles.helpmanual.io/api/rust_backend/

FolderIdentity = tuple[int, int]
"""Device and inode."""
_LOG: Final = logging.getLogger(__name__)
_SOON: Final = 0.02
"""Seconds from a first event to the question what it was: by then watchfiles has read it, and a small file is whole."""
_PACE: Final = 0.3
"""Seconds between questions where the kernel does not tell of events, or told of one that watchfiles did not."""
_BUSY_PACE: Final = 0.1
"""The same while something is being written."""
_BUSY_SECONDS: Final = 2.0
_CHUNK: Final = 512
"""Folders in one instance; setting one up takes 20 to 50 us a folder, and the event loop waits meanwhile."""
_SPARE_INSTANCES: Final = 3
_BURST: Final = 1024
"""With more changed paths at once, the kernel's queue (16,384 events by default) may have overflowed."""
_MANY_FOLDERS: Final = 64
"""When more watches than this begin at once, a whole scan is cheaper than each of the folders."""
_LOOK_AT_ROOTS: Final = 1.0
"""Seconds to the next look at the configured folders once something was different there."""
_LOOK_FOR_MISSING: Final = 5.0
"""Seconds between two such looks, at most, while one of them, or another wanted folder, is not there.

The same where one is come by through a link, which may be made to lead elsewhere; nobody tells of that.
"""
_LONGEST_LOOK: Final = 30.0
"""The same while all are there: that one goes or is mounted over is told, but not that a folder above it is renamed."""
_RACY: Final = 0.05
"""Seconds for which a folder's modification time may hide a second change: clocks of file systems tick slowly."""
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds for which a folder is not watched once that has failed, at first and, after failing again, at most."""
_NEVER_MODELS: Final = (".part", ".partial", ".incomplete", ".tmp", ".crdownload", ".lock")
OnPaths = Callable[[frozenset[str]], None]


class Change(IntEnum):
    """What has happened to a path, as watchfiles numbers it."""

    ADDED = 1
    MODIFIED = 2
    DELETED = 3


class FolderWatch:
    """Watches folders until it is stopped; heals itself.

    Both callbacks run in the event loop: ``on_paths`` with the absolute paths of files and folders that changed or may
    have, coalesced; ``on_doubt`` when anything may have changed.
    """

    def __init__(self, roots: Sequence[str], on_paths: OnPaths, on_doubt: Callable[[], None]) -> None:
        """``roots`` are the configured folders, which may come and go without anything above them being watched."""
        self._on_paths = on_paths
        self._on_doubt = on_doubt
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener = _Listener(roots, partial(self._tell, on_paths), partial(self._tell, on_doubt))

    @property
    def unheard(self) -> frozenset[str]:
        """The folders, each with all below it, that change without being heard of."""
        return self._listener.unheard

    def follow(self, folders: Mapping[str, FolderIdentity], growing: Mapping[str, int]) -> None:
        """Watch exactly these folders from now on.

        ``growing`` are files in them that are being written, with the size in bytes that each will have; events about
        these are held back until it is reached.
        """
        self._listener.follow(folders, growing)

    def reconfigure(self, roots: Sequence[str]) -> None:
        """Take other configured folders; what is in them is watched once ``follow`` names it."""
        self._listener.reconfigure(roots)

    def begin_anew(self) -> None:
        """Set up every watch anew: something has happened that should have been heard of."""
        self._listener.begin_anew()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="folder-watch")
        listening = self._loop.run_in_executor(thread, self._listener.listen)
        try:
            await asyncio.shield(listening)
        finally:
            self._listener.stop()
            await listening
            thread.shutdown(wait=False)

    def _tell(self, callback: Callable[..., None], *what: frozenset[str]) -> None:
        if self._loop is not None and not self._listener.stopping:
            self._loop.call_soon_threadsafe(callback, *what)


class _Unheard(Exception):
    """Ends a question to watchfiles that has no answer yet."""


class _Glance:
    """What watchfiles is given to be stopped by, and is asked about at each of its turns: ends it after a few.

    By an exception: stopped in its own ways, it forgets what it heard in that moment. A turn in which nothing more was
    heard than in the one before has an answer; so it takes two, or more where a lot happens.
    """

    _TURNS: Final = 4

    def __init__(self) -> None:
        self._left = self._TURNS

    def is_set(self) -> bool:
        self._left -= 1
        if self._left < 0:
            raise _Unheard
        return False


class _Instance:
    """One instance of watchfiles, that is, of inotify, with some folders."""

    def __init__(self, folders: Collection[str], queued: QueuedEvents | None) -> None:
        """Begin to watch. What this raises is not closed: OSError and errors of watchfiles' own."""
        self.folders = frozenset(folders)
        others = inotify_descriptors()
        # A refused permission would have it ignore all other errors, too.
        self._notify = RustNotify(
            [*folders],
            debug=False,
            force_polling=False,
            poll_delay_ms=0,
            recursive=False,
            ignore_permission_denied=False,
        )
        self.is_announced = queued is not None and queued.announce_new(others)
        """Whether the kernel tells when there may be something new."""

    def changes(self) -> set[tuple[Change, str]]:
        """What happened since the last time; waits for nothing. Raises when the watch has ended."""
        try:
            heard = self._notify.watch(1, 0, 0, _Glance())
        except _Unheard:
            return set()
        # It has a word for each way to be stopped, too, and is in none of them.
        return {(Change(kind), path) for kind, path in heard} if isinstance(heard, set) else set()

    def close(self) -> None:
        self._notify.close()


class _Listener:
    """What runs in the watch's thread.

    Only ``follow``, ``reconfigure``, ``begin_anew``, ``stop`` and ``unheard`` are for others.
    """

    def __init__(self, roots: Sequence[str], tell_paths: OnPaths, tell_doubt: Callable[[], None]) -> None:
        self._roots = tuple(roots)
        self._tell_paths = tell_paths
        self._tell_doubt = tell_doubt
        self.unheard: frozenset[str] = frozenset()
        self.stopping = False
        self._wanted: Mapping[str, FolderIdentity] = {}
        self._orders: tuple[Mapping[str, FolderIdentity], Mapping[str, int]] | None = None
        self._ordered_roots: tuple[str, ...] | None = None
        self._told_what_is_there = False
        self._has_begun = False
        self._anew = False
        self._wake_fd = -1
        self._queued: QueuedEvents | None = None
        self._ask_at = math.inf  # when the instances are asked; while that is not known, the kernel is listened to
        self._may_come = False  # whether something had been queued when they were asked last
        self._lock = threading.Lock()
        self._watched: dict[str, tuple[FolderIdentity, _Instance]] = {}
        self._instances: list[_Instance] = []
        self._missing: set[str] = set()  # wanted, but not there or not to be read
        self._set_aside: dict[str, tuple[float, float]] = {}  # until when, after which pause; also for a while after
        self._sampled: dict[str, int | None] = {}  # folders of growing files, with the modification time last seen
        self._failed: set[str] = set()  # those the kernel would not watch
        self._set_up_at: float | None = None  # when the watches are to be set up again
        self._pause = _FIRST_PAUSE
        self._failed_at = 0.0
        self._growing = GrowingFiles()
        self._busy_until = 0.0
        self._local_roots: tuple[str, ...] = ()
        self._is_any_linked = False
        self._seen_roots: dict[str, FolderIdentity | None] = {}
        self._look_at_roots_at = 0.0
        self._look_pause = _LOOK_AT_ROOTS
        self._kernel_tells = False  # of queued events, as it has done at least once
        self._mounts: frozenset[Mount] | None = None
        self._unheard_devices: frozenset[int] = frozenset()
        self._said: str | None = None

    def follow(self, folders: Mapping[str, FolderIdentity], growing: Mapping[str, int]) -> None:
        with self._lock:
            self._orders = folders, growing
        self._wake()

    def reconfigure(self, roots: Sequence[str]) -> None:
        with self._lock:
            self._ordered_roots = tuple(roots)
        self._wake()

    def begin_anew(self) -> None:
        self._anew = True
        self._wake()

    def stop(self) -> None:
        self.stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def listen(self) -> None:
        with ExitStack() as stack:
            poll = select.poll()
            wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, wake_fd)
            stack.callback(self._end)
            self._wake_fd = wake_fd
            poll.register(wake_fd, select.POLLIN)
            try:
                poll.register(stack.enter_context(MOUNTS_PATH.open("rb")), select.POLLPRI)
            except OSError:
                _LOG.debug("mounts are not heard of here")
            try:
                self._queued = stack.enter_context(closing(QueuedEvents()))
            except OSError as error:
                _LOG.debug("the kernel does not tell of queued events here: %s", error)
            self._read_mounts()
            while not self.stopping:
                self._listen_once(time.monotonic())
                for fd, _ in self._wait(poll):
                    if fd == wake_fd:
                        os.eventfd_read(fd)
                    elif self._queued is not None and fd == self._queued.fileno():
                        self._ask_at = time.monotonic() + _SOON
                    else:
                        self._read_mounts()

    def _wait(self, poll: select.poll) -> list[tuple[int, int]]:
        """Wait until something is due, or heard."""
        due = [self._ask_at, self._growing.rests_at()]
        if self._told_what_is_there:
            due.append(self._look_at_roots_at)
        if self._set_up_at is not None:
            due.append(self._set_up_at)
        until = min(due)
        pause = None if math.isinf(until) else max(0.0, until - time.monotonic()) * 1e3
        if self._queued is None or not math.isinf(self._ask_at):
            return poll.poll(pause)
        poll.register(self._queued, select.POLLIN)
        try:
            return poll.poll(pause)
        finally:
            poll.unregister(self._queued)

    def _end(self) -> None:
        with self._lock:
            self._wake_fd = -1
        for instance in self._instances:
            instance.close()

    def _listen_once(self, now: float) -> None:
        self._take_orders(now)
        if self._told_what_is_there and now >= self._look_at_roots_at:
            self._look_at_roots(now)
            self._look_at_roots_at = now + self._look_pause
            self._look_pause = min(2 * self._look_pause, self._longest_look())
            # In case that an event was not told of.
            self._ask_at = min(self._ask_at, now)
        if self._set_up_at is not None and self._set_up_at <= now:
            self._set_up(now)
        if self._ask_at <= now:
            self._ask(now)
        self._sample(now)
        if rested := self._growing.at_rest(now):
            self._tell_paths(frozenset(rested))
        if self._sampled or now < self._busy_until:
            self._ask_at = min(self._ask_at, now + _BUSY_PACE)

    def _ask(self, now: float) -> None:
        """Ask all instances what they heard."""
        is_surprised = not self._may_come and now >= self._busy_until
        # Of what is queued from here on, it is told again; but watchfiles may not have read yet what came just before.
        self._may_come = self._queued is not None and self._queued.take()
        self._kernel_tells |= self._may_come
        for instance in tuple(self._instances):
            if self._hear(instance, now) and is_surprised and not self._may_come:
                # Some kernels take the order and tell of nothing.
                instance.is_announced = False
        if self._may_come or not all(instance.is_announced for instance in self._instances):
            self._ask_at = now + _PACE
        else:
            self._ask_at = math.inf

    def _take_orders(self, now: float) -> None:
        with self._lock:
            orders, self._orders = self._orders, None
            roots, self._ordered_roots = self._ordered_roots, None
        if roots is not None:
            self._roots = roots
            self._seen_roots = {root: seen for root, seen in self._seen_roots.items() if root in roots}
            self._read_mounts()
            self._look_soon(now)
        if orders is not None:
            folders, growing = orders
            self._told_what_is_there = True
            self._growing.expect(growing)
            if folders is not self._wanted:
                # One that went and came back between two looks is the same folder; that it is there is news.
                self._seen_roots |= {root: None for root in self._roots if root in self._wanted and root not in folders}
                self._wanted = folders
                self._set_up_by(now)
                self._look_soon(now)
        if self._anew:
            self._anew = False
            self._watched.clear()
            self._set_aside.clear()
            self._set_up_by(now)

    def _read_mounts(self) -> None:
        table = MountTable.now()
        real_roots = {root: table.resolve(root) for root in self._roots}
        self._local_roots = tuple(root for root, path in real_roots.items() if table.is_heard(path))
        self._is_any_linked = any(root != path for root, path in real_roots.items())
        self._unheard_devices = table.unheard_devices()
        mounts = table.concerning(real_roots.values())
        if mounts != self._mounts:
            if self._mounts is not None:
                self._tell_doubt()
            self._mounts = mounts
            now = time.monotonic()
            self._set_up_by(now)
            self._look_soon(now)

    def _look_at_roots(self, now: float) -> None:
        """Notice that a configured folder came, went or is another, and that a folder can be read now."""
        for root in self._local_roots:
            identity = _identity(root)
            # At first, it is the scan that has seen it.
            if self._seen_roots.setdefault(root, self._wanted.get(root)) != identity:
                self._seen_roots[root] = identity
                self._look_soon(now)
                self._tell_paths(frozenset([root]))
        if any(map(_can_be_read, self._missing)):
            self._set_up_by(now)

    def _look_soon(self, now: float) -> None:
        self._look_pause = _LOOK_AT_ROOTS
        self._look_at_roots_at = min(self._look_at_roots_at, now + _LOOK_AT_ROOTS)

    def _longest_look(self) -> float:
        if not self._kernel_tells:
            # It may be one that takes the order and tells of nothing: then this look is what finds that out.
            return _LOOK_AT_ROOTS
        is_any_missing = bool(self._missing) or None in self._seen_roots.values()
        return _LOOK_FOR_MISSING if is_any_missing or self._is_any_linked else _LONGEST_LOOK

    def _set_up(self, now: float) -> None:
        """Bring what is watched in line with what is wanted."""
        self._set_up_at = None
        self._watched = {folder: kept for folder, kept in self._watched.items() if folder in self._wanted}
        self._sampled = {folder: seen for folder, seen in self._sampled.items() if folder in self._wanted}
        self._set_aside = {
            folder: (until, pause) for folder, (until, pause) in self._set_aside.items() if now < until + _LONGEST_PAUSE
        }
        set_aside = {folder: until for folder, (until, _) in self._set_aside.items() if now < until}
        unheard = {
            folder
            for folder, (device, _) in self._wanted.items()
            if device in self._unheard_devices or folder in set_aside or not _is_utf8(folder)
        }
        unheard.update(root for root in self._roots if root not in self._local_roots)
        lacking = [
            folder
            for folder, identity in self._wanted.items()
            if folder not in unheard
            and folder not in self._sampled
            and (folder not in self._watched or self._watched[folder][0] != identity)
        ]
        ready = [folder for folder in lacking if _can_be_read(folder)]
        self._missing = set(lacking).difference(ready)
        if lacking:
            # What is missing may be back at once; and of what is watched from now on, an event may not be told of.
            self._look_soon(now)
        self._failed = set(ready).difference(self._begin(ready))
        self._drop_instances()
        if self._failed:
            self._set_up_later(now)
        elif now > self._failed_at + _LONGEST_PAUSE:
            self._pause = _FIRST_PAUSE
        if set_aside:
            self._set_up_by(min(set_aside.values()))
        unheard |= self._failed
        begun = frozenset(ready).difference(self._failed) | (unheard - self.unheard)
        self.unheard = frozenset(unheard)
        if len(begun) > _MANY_FOLDERS or (begun and not self._has_begun):
            self._has_begun = True
            self._tell_doubt()
        elif begun:
            self._tell_paths(frozenset(begun))

    def _set_up_by(self, moment: float) -> None:
        self._set_up_at = moment if self._set_up_at is None else min(self._set_up_at, moment)

    def _set_up_later(self, now: float) -> None:
        self._failed_at = now
        self._set_up_by(now + self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _begin(self, folders: Sequence[str]) -> set[str]:
        """Watch some folders, and return those for which it worked."""
        begun: set[str] = set()
        for first in range(0, len(folders), _CHUNK):
            chunk = folders[first : first + _CHUNK]
            try:
                instance = _Instance(chunk, self._queued)
            except Exception as error:  # noqa: BLE001  # see _Instance
                self._say(error)
                continue
            self._instances.append(instance)
            self._watched.update({folder: (self._wanted[folder], instance) for folder in chunk})
            begun.update(chunk)
            # What it hears before it is announced is told of by nobody.
            self._busy_until = max(self._busy_until, time.monotonic() + _PACE)
        if len(begun) == len(folders):
            self._said = None
        return begun

    def _drop_instances(self) -> None:
        """Close the instances that nothing needs, and join small ones if there are many."""
        sizes = Counter(instance for _, instance in self._watched.values())
        needed = -(-len(self._watched) // _CHUNK)
        if len(sizes) > needed + _SPARE_INSTANCES:
            small = {instance for instance, size in sizes.items() if size <= _CHUNK // 2}
            begun = self._begin([folder for folder, (_, instance) in self._watched.items() if instance in small])
            if begun:
                sizes = Counter(instance for _, instance in self._watched.values())
        now = time.monotonic()
        for instance in [instance for instance in self._instances if instance not in sizes]:
            # What it heard since it was last asked, its successor has not.
            self._hear(instance, now)
            if instance in self._instances:
                self._instances.remove(instance)
                instance.close()

    def _sample(self, now: float) -> None:
        """Ask for the states of folders in which files grow, in place of hearing of them."""
        growing = self._growing.folders(now)
        for folder in growing.difference(self._sampled):
            if folder in self._watched:
                self._sampled[folder] = _modified(folder)
                self._leave_out(folder)
        for folder, before in tuple(self._sampled.items()):
            worth = self._growing.look_into(folder, now)
            modified = _modified(folder)
            if modified is None or modified != before:
                worth.add(folder)
                self._sampled[folder] = modified
            if folder not in growing:
                del self._sampled[folder]
                self._set_up_by(now)
            if worth:
                self._tell_paths(frozenset(worth))

    def _leave_out(self, folder: str) -> None:
        """Cease to watch one folder; watchfiles can only do so for all of an instance."""
        _, instance = self._watched.pop(folder)
        self._begin([other for other, (_, by) in self._watched.items() if by is instance])
        self._drop_instances()

    def _hear(self, instance: _Instance, now: float) -> bool:
        """Ask one instance, tell what it heard, and return whether that was anything."""
        try:
            changes = instance.changes()
        except Exception as error:  # noqa: BLE001  # see _Instance
            self._lose(instance, error, now)
            return False
        if not changes:
            return False
        self._busy_until = now + _BUSY_SECONDS
        if len(changes) >= _BURST:
            self._tell_doubt()
        paths = {path for change, path in changes if _may_matter(change, path)}
        self._growing.note((path for change, path in changes if change is Change.MODIFIED), now)
        for gone in [path for change, path in changes if change is Change.DELETED and path in self._watched]:
            # Should there be a folder of this name again, it may even have the same inode.
            del self._watched[gone]
            self._set_up_by(now)
        if paths := self._growing.worth_a_look(paths, now):
            self._tell_paths(frozenset(paths))
        return True

    def _lose(self, instance: _Instance, error: BaseException, now: float) -> None:
        """Go on without an instance that has ended, and what it heard last."""
        self._instances.remove(instance)
        instance.close()
        lost = {folder for folder, (_, by) in self._watched.items() if by is instance}
        self._watched = {folder: kept for folder, kept in self._watched.items() if folder not in lost}
        # Unable to decode path "/models/x/odd-\xFF.gguf" to string
        message = str(_first_of(error)).replace("\\\\", "\\").replace('\\"', '"')
        named = [folder for folder in instance.folders if f'"{folder}/' in message]
        if named:
            folder = max(named, key=len)
            _, pause = self._set_aside.get(folder, (0, _FIRST_PAUSE / 2))
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._set_aside[folder] = now + pause, pause
            self._set_up_by(now)
        else:
            self._say(error)
            self._set_up_later(now)
            self.unheard |= lost

    def _say(self, error: BaseException) -> None:
        error = _first_of(error)
        sentence = f"{type(error).__name__}: {error}"
        if sentence != self._said:
            self._said = sentence
            _LOG.warning(
                "not every change in the model folders is heard of for now; they are looked at every few seconds: %s",
                sentence,
            )


def _first_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _may_matter(change: Change, path: str) -> bool:
    """Whether a path may be a model, a folder, or a download's control file whose end says that the model is there."""
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return False
    if not name.endswith(_NEVER_MODELS):
        return True
    return change is Change.ADDED and os.path.isdir(path)  # noqa: PTH112  # the string is what there is


def _is_utf8(path: str) -> bool:
    return path.isascii() or path == path.encode(errors="replace").decode()


def _can_be_read(folder: str) -> bool:
    return os.access(folder, os.R_OK, effective_ids=True)


def _identity(folder: str) -> FolderIdentity | None:
    try:
        status = os.stat(folder)  # noqa: PTH116  # for each, again and again: without the detour
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _modified(folder: str) -> int | None:
    """When the folder's list of files last changed, in nanoseconds; ``None`` where it may change again unnoticed."""
    try:
        modified = os.stat(folder).st_mtime_ns  # noqa: PTH116  # several times a second
    except OSError:
        return None
    return None if abs(time.time() - modified / 1e9) < _RACY else modified
