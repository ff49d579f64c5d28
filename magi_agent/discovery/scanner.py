"""Scanning folders for models.

``Scanner`` remembers what it saw: a file whose identity (device, inode, size, modification time) is the same is not
read again, and a folder in which nothing changed is not assembled again. It blocks, so it belongs in a thread of its
own; it must not be used from two threads at once. It works without an event loop.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from magi_agent.discovery.assembly import FolderAssembly, Problem
from magi_agent.discovery.distinct import distinct
from magi_agent.discovery.facts import FileIdentity, ModelFacts, TierThresholds
from magi_agent.discovery.files import FileRecord
from magi_agent.discovery.folders import MAX_DEPTH, Entry, Listing, Walk, is_within, join
from magi_agent.discovery.header_cache import HeaderCache
from magi_agent.discovery.looking import Looker, entry_of
from magi_agent.discovery.names import is_model_filename

_LOG = logging.getLogger(__name__)

FolderProblem = Problem
_MAX_HINTS = 4
_CONTROL_SUFFIX = ".aria2"
_CACHE_SLACK = 1000


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What the folders hold now; of a refresh too, all of it."""

    models: tuple[ModelFacts, ...]  # by path
    problems: tuple[FolderProblem, ...]  # folders and files that could not be looked at, by path
    unsettled: tuple[str, ...]  # files to look at again soon: they may change without a new identity
    headers_read: int  # from files, in this scan; the rest was remembered
    files_seen: int  # in this scan
    duration: float  # seconds


@dataclass(slots=True)
class _Folder:
    """What is known of one folder."""

    assembly: FolderAssembly
    depth: int
    identity: tuple[int, int] | None
    records: dict[str, FileRecord] = field(default_factory=dict)


class Scanner:
    """Finds the models in folders, again and again."""

    def __init__(
        self, folders: Sequence[str | Path], thresholds: TierThresholds | None = None, cache_path: Path | None = None
    ) -> None:
        """Scan ``folders`` recursively. ``cache_path`` is a file in which headers are kept across starts."""
        self._roots = list(dict.fromkeys(_absolute(folder) for folder in folders))
        self._thresholds = thresholds or TierThresholds()
        self._cache = HeaderCache(cache_path)
        self._folders: dict[str, _Folder] = {}
        self._problems: dict[str, FolderProblem] = {}  # of folders, by path
        self._last: tuple[ModelFacts, ...] | None = None
        self._looker = Looker(self._cache)
        self._files_seen = 0

    @property
    def folders(self) -> tuple[str, ...]:
        """The configured folders, absolute."""
        return tuple(self._roots)

    def scan(self) -> ScanResult:
        """Look at everything."""
        begin = self._begin()
        before = self._folders
        walk = Walk(self._roots)
        found: dict[str, _Folder] = {}
        for root in self._roots:
            for listing in walk.listings(root, 0, is_root=True):
                found[listing.path] = self._take_listing(listing, walk)
        if before.keys() - found.keys():
            self._last = None
        self._folders = found
        self._problems = {problem.path: problem for problem in walk.problems}
        identities = self._identities() if len(self._cache) > _CACHE_SLACK else set()
        if len(self._cache) > 2 * len(identities) + _CACHE_SLACK:
            # Not at every scan: a disk that is not mounted now will be back.
            self._cache.keep_only(identities)
        return self._finish(begin)

    def refresh(self, paths: Iterable[str]) -> ScanResult:
        """Look again at some files and folders only, with all that is below them.

        Paths outside the configured folders, hidden ones and ones of other kinds of files are left alone; what is
        gone is forgotten.
        """
        begin = self._begin()
        for path in _outermost(_absolute(path) for path in paths):
            self._refresh(path)
        return self._finish(begin)

    def _begin(self) -> float:
        self._looker.headers_read = self._files_seen = 0
        return time.monotonic()

    def _finish(self, begin: float) -> ScanResult:
        if self._last is None:
            self._last = distinct(folder.assembly.candidates for folder in self._folders.values())
        self._cache.save()
        problems = [*self._problems.values()]
        for folder in self._folders.values():
            problems += folder.assembly.problems
        return ScanResult(
            models=self._last,
            problems=tuple(sorted(problems, key=_path)),
            unsettled=tuple(self._unsettled()),
            headers_read=self._looker.headers_read,
            files_seen=self._files_seen,
            duration=time.monotonic() - begin,
        )

    def _unsettled(self) -> list[str]:
        return [
            record.path for folder in self._folders.values() for record in folder.records.values() if not record.settled
        ]

    def _identities(self) -> set[FileIdentity]:
        return {
            record.identity
            for folder in self._folders.values()
            for record in folder.records.values()
            if record.identity is not None
        }

    def _refresh(self, path: str) -> None:
        path = path.removesuffix(_CONTROL_SUFFIX)
        root = next((root for root in self._roots if is_within(path, root)), None)
        if root is None:
            return
        inner = path[len(root) :].strip("/")
        if any(part.startswith(".") for part in inner.split("/")):
            return
        while path != root and Path(path).is_symlink() and _is_folder(path):
            path = path.rpartition("/")[0]  # whether a link to a folder is followed is for the walk from above to say
        if path == root or _is_folder(path):
            self._refresh_folder(path, root)
        else:
            self._forget_below(path)
            self._refresh_file(path, root)

    def _refresh_folder(self, path: str, root: str) -> None:
        depth = _depth(path, root)
        if depth > MAX_DEPTH:
            return
        known = {name: folder for name, folder in self._folders.items() if is_within(name, path)}
        elsewhere = {folder.identity for name, folder in self._folders.items() if folder.identity and name not in known}
        walk = Walk(self._roots, elsewhere)
        found = {
            listing.path: self._take_listing(listing, walk)
            for listing in walk.listings(path, depth, is_root=path == root)
        }
        if known.keys() - found.keys():
            self._last = None
        for name in known:
            del self._folders[name]
        self._folders.update(found)
        self._problems = {name: problem for name, problem in self._problems.items() if not is_within(name, path)} | {
            problem.path: problem for problem in walk.problems
        }

    def _forget_below(self, path: str) -> None:
        for known in [known for known in self._folders if is_within(known, path)]:
            del self._folders[known]
            self._last = None
        self._problems = {name: problem for name, problem in self._problems.items() if not is_within(name, path)}

    def _refresh_file(self, path: str, root: str) -> None:
        parent, _, name = path.rpartition("/")
        parent = parent or "/"
        if not is_model_filename(name):
            self._refresh_links_to(path)
            return
        folder = self._folders.get(parent)
        if folder is None:
            if _is_folder(parent):
                self._refresh_folder(parent, root)
            return
        entry = entry_of(path)
        self._files_seen += 1
        if entry is None:
            changed = folder.records.pop(name, None) is not None
        else:
            downloading = os.path.lexists(path + _CONTROL_SUFFIX)
            walk = Walk(self._roots)
            record = self._looker.record(entry, path, folder.records.get(name), walk, downloading=downloading)
            changed = record is not folder.records.get(name)
            folder.records[name] = record
        if changed:
            self._reassemble(folder)
        self._refresh_links_to(path)

    def _refresh_links_to(self, target: str) -> None:
        """Look again at links whose file changed: no event comes from the link (Hugging Face's cache has such)."""
        for folder in self._folders.values():
            links = [record for record in folder.records.values() if record.link_target == target]
            for record in links:
                entry = Entry(record.filename, is_link=True, status=None)
                folder.records[record.filename] = self._looker.record(
                    entry, record.path, record, Walk(self._roots), downloading=False
                )
            if links:
                self._reassemble(folder)

    def _take_listing(self, listing: Listing, walk: Walk) -> _Folder:
        folder = self._folders.get(listing.path)
        if folder is None:
            folder = _Folder(self._assembly(listing.path), listing.depth, None)
            self._last = None
        folder.identity = listing.identity
        records: dict[str, FileRecord] = {}
        changed = len(listing.entries) != len(folder.records)
        for entry in listing.entries:
            known = folder.records.get(entry.name)
            downloading = entry.name in listing.downloading
            record = self._looker.record(entry, join(listing.path, entry.name), known, walk, downloading=downloading)
            changed = changed or record is not known
            records[entry.name] = record
        self._files_seen += len(records)
        if changed:
            folder.records = records
            self._reassemble(folder)
        return folder

    def _reassemble(self, folder: _Folder) -> None:
        before = folder.assembly.candidates
        folder.assembly.update(folder.records.values())
        if folder.assembly.candidates != before:
            self._last = None

    def _assembly(self, path: str) -> FolderAssembly:
        root = next((root for root in self._roots if is_within(path, root)), path)
        inner = [part for part in path[len(root) :].split("/") if part]
        # The configured folder's own name may name its models (".../Qwen3-8B-GGUF"); what is above it does not.
        hints = [*reversed(inner), root.rpartition("/")[2]][:_MAX_HINTS]
        return FolderAssembly(path, hints, self._thresholds)


def _path(problem: FolderProblem) -> str:
    return problem.path


def _depth(path: str, root: str) -> int:
    return len([part for part in path[len(root) :].split("/") if part])


def _absolute(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def _outermost(paths: Iterable[str]) -> list[str]:
    """Leave out what lies below another of the paths."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not kept or not is_within(path, kept[-1]):
            kept.append(path)
    return kept
