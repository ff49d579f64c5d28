"""Scanning folders for models.

``Scanner`` remembers what it saw: a file whose identity (device, inode, size, modification time) is the same is not
read again, and a folder in which nothing changed is not assembled again. It blocks, so it belongs in a thread of its
own; it must not be used from two threads at once. It works without an event loop.

A folder whose file system does not answer when it is asked before each look, and one that cannot be read but may well
be there, are left out of the look: what was known of them holds on.
"""

import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from magi_agent.discovery.answering import AnsweringFileSystems, Whereabouts
from magi_agent.discovery.assembly import FolderAssembly, Problem
from magi_agent.discovery.distinct import distinct
from magi_agent.discovery.facts import FileIdentity, ModelFacts, TierThresholds
from magi_agent.discovery.files import FileRecord, sentence_of
from magi_agent.discovery.folders import (
    CONTROL_SUFFIX,
    MAX_DEPTH,
    Listing,
    Walk,
    is_within,
    join,
    says_what_is_there,
)
from magi_agent.discovery.header_cache import HeaderCache
from magi_agent.discovery.looking import Looker, entry_of
from magi_agent.discovery.names import is_model_filename
from magi_agent.vocabulary import ModelStatus

FolderProblem = Problem
_MAX_HINTS = 4
_CACHE_SLACK = 1000
_MOST_WALKS = 3
"""In one look, while configured folders come and go."""


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What the folders hold now; of a refresh too, all of it."""

    models: tuple[ModelFacts, ...]  # by path; the same object as before where nothing changed
    problems: tuple[FolderProblem, ...]  # what could not be looked at, configured folders first, then by path
    silent: Mapping[str, float]  # folders whose file system did not answer, left as they were known; since (monotonic)
    unsettled: tuple[str, ...]  # files to look at again soon: they may change without a new identity
    growing: Mapping[str, int]  # files shorter than their header says, or empty, with the bytes at which to look again
    folders: Mapping[str, tuple[int, int]]  # device and inode by path; the same object as before where nothing changed
    devices: frozenset[int]  # those of the folders, and of where configured ones would be that are not there
    headers_read: int  # from files, in this scan; the rest was remembered
    files_seen: int  # in this scan
    duration: float  # seconds


@dataclass(slots=True)
class _Folder:
    """What is known of one folder."""

    path: str
    assembly: FolderAssembly
    identity: tuple[int, int] | None = None
    has_linked_folders: bool = False
    records: dict[str, FileRecord] = field(default_factory=dict)
    links: list[FileRecord] = field(default_factory=list)  # those of the records that are symbolic links
    other_links: set[str] = field(default_factory=set)  # names of links by whose way those may lead, and to folders
    unsettled: list[str] = field(default_factory=list)
    growing: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Pending:
    """What a refresh has left to do once it has looked at all of its paths."""

    everything: bool = False
    folders: bool = False  # some may have come or gone
    all_links: bool = False
    link_targets: set[str] = field(default_factory=set)


class Scanner:
    """Finds the models in folders, again and again."""

    def __init__(
        self, folders: Sequence[str | Path], thresholds: TierThresholds | None = None, cache_path: Path | None = None
    ) -> None:
        """Scan ``folders`` recursively. ``cache_path`` is a file in which headers are kept across starts."""
        self._roots = list(dict.fromkeys(_absolute(folder) for folder in folders))
        self._thresholds = thresholds or TierThresholds()
        self._configured = self._roots, self._thresholds
        self._cache = HeaderCache(cache_path)
        self._folders: dict[str, _Folder] = {}
        self._problems: dict[str, FolderProblem] = {}  # of folders, by path
        self._last: tuple[ModelFacts, ...] | None = None
        self._listed: dict[str, tuple[int, int]] = {}
        self._devices: frozenset[int] = frozenset()
        self.whereabouts = Whereabouts()
        """What is being looked at now; may be asked from any thread."""
        self._file_systems = AnsweringFileSystems()
        self._silent: Mapping[str, float] = {}
        self._looker = Looker(self._cache, self.whereabouts)
        self._files_seen = 0
        self._pending = _Pending()
        self._root_identities: list[tuple[int, int] | None] = []

    @property
    def folders(self) -> tuple[str, ...]:
        """The configured folders, absolute."""
        return tuple(self._roots)

    def reconfigure(self, folders: Sequence[str | Path], thresholds: TierThresholds) -> None:
        """Take other folders and thresholds from the next whole scan on. Another thread may be scanning meanwhile."""
        self._configured = list(dict.fromkeys(_absolute(folder) for folder in folders)), thresholds

    def scan(self) -> ScanResult:
        """Look at everything."""
        begin = time.monotonic()
        configured = self._configured
        if configured != (self._roots, self._thresholds):
            # Every folder's models may be others now; their headers are remembered.
            self._roots, self._thresholds = configured
            self._folders = {}
            self._last = None
        self._begin()
        self._look_at_everything()
        identities = self._identities() if len(self._cache) > _CACHE_SLACK else set()
        if len(self._cache) > 2 * len(identities) + _CACHE_SLACK:
            # Not at every scan: a disk that is not mounted now will be back.
            self._cache.keep_only(identities)
        return self._finish(begin)

    def refresh(self, paths: Iterable[str]) -> ScanResult:
        """Look again at some files and folders only, with all that is below them.

        Paths outside the configured folders, hidden ones and ones of other kinds of files are left alone; what is
        gone is forgotten. The answer is a scan's, provided the paths name all that changed.
        """
        begin = time.monotonic()
        self._begin()
        # A configured folder that came or went is no change below it: it may be a link, or a disk's mount point.
        self._pending.everything = self._root_identities != self._identities_of_roots()
        inside = [
            path for path in map(_absolute, paths) if self._root_of(path) is not None and not self._is_silent(path)
        ]
        # What is gone comes first: a folder that was moved is then met once, under its new name.
        for path in sorted(_outermost(inside), key=os.path.lexists):
            self._refresh(path)
        self._look_at_links()
        if self._pending.everything or self._root_identities != self._identities_of_roots():
            self._look_at_everything()
        return self._finish(begin)

    def _begin(self) -> None:
        self._looker.headers_read = self._files_seen = 0
        self._pending = _Pending()
        self._silent = self._file_systems.silent(self._roots)

    def _is_silent(self, path: str) -> bool:
        return any(is_within(path, folder) for folder in self._silent)

    def _identities_of_roots(self) -> list[tuple[int, int] | None]:
        """The configured folders' identities; of one that does not answer, the one last seen."""
        before = dict(zip(self._roots, self._root_identities, strict=False))
        return [before.get(root) if root in self._silent else self._identity_of_root(root) for root in self._roots]

    def _identity_of_root(self, root: str) -> tuple[int, int] | None:
        self.whereabouts.at(root)
        return _folder_identity(root)

    def _walk(self, visited: set[tuple[int, int]] | None = None) -> Walk:
        return Walk(self._roots, visited, self._silent, self.whereabouts.at)

    def _still_known(self, walk: Walk) -> dict[str, _Folder]:
        """The folders that are as they were known, because the walk could not learn what is in them now."""
        if not walk.unread:
            return {}
        return {
            path: folder
            for path, folder in self._folders.items()
            if any(is_within(path, unread) for unread in walk.unread)
        }

    def _finish(self, begin: float) -> ScanResult:
        if self._last is None:
            self._last = distinct(folder.assembly.candidates for folder in self._folders.values())
        if self._pending.folders:
            listed = {path: folder.identity for path, folder in self._folders.items() if folder.identity is not None}
            self._listed = self._listed if listed == self._listed else listed
            self._devices = frozenset({device for device, _ in listed.values()} | self._devices_of_missing_roots())
        self._cache.save()
        self.whereabouts.at(None)
        problems = [*self._problems.values()]
        unsettled: list[str] = []
        growing: dict[str, int] = {}
        for folder in self._folders.values():
            problems += folder.assembly.problems
            unsettled += folder.unsettled
            growing |= folder.growing
        roots = frozenset(self._roots)
        return ScanResult(
            models=self._last,
            problems=tuple(sorted(problems, key=lambda problem: (problem.path not in roots, problem.path))),
            silent=self._silent,
            unsettled=tuple(unsettled),
            growing=growing,
            folders=self._listed,
            devices=self._devices,
            headers_read=self._looker.headers_read,
            files_seen=self._files_seen,
            duration=time.monotonic() - begin,
        )

    def _devices_of_missing_roots(self) -> set[int]:
        """The devices from which configured folders were removed, or on which nothing is mounted at them."""
        missing = [root for root in self._roots if root not in self._folders and not self._is_silent(root)]
        above = [next(filter(None, map(_folder_identity, map(str, Path(root).parents))), None) for root in missing]
        return {identity[0] for identity in above if identity}

    def _identities(self) -> set[FileIdentity]:
        return {
            record.identity
            for folder in self._folders.values()
            for record in folder.records.values()
            if record.identity is not None
        }

    def _look_at_everything(self) -> None:
        # A configured folder that goes while it is looked at must not be taken for one that was emptied.
        for _ in range(_MOST_WALKS):
            self._walk_over_everything()
            if self._root_identities == self._identities_of_roots():
                return

    def _walk_over_everything(self) -> None:
        self._root_identities = self._identities_of_roots()
        self._pending.folders = True
        walk = self._walk()
        listings = walk.listings([(root, 0) for root in self._roots])
        found = {listing.path: self._take_listing(listing, walk) for listing in listings}
        found = self._still_known(walk) | found
        if self._folders.keys() - found.keys():
            self._last = None
        self._folders = found
        self._problems = {problem.path: problem for problem in walk.problems}

    def _refresh(self, path: str) -> None:
        if path.endswith(CONTROL_SUFFIX) and is_model_filename(path.removesuffix(CONTROL_SUFFIX).rpartition("/")[2]):
            self._refresh(path.removesuffix(CONTROL_SUFFIX))
        root = self._root_of(path)
        if root is None:
            return
        if path == root:
            self._look_at_folder(root, root)
            return
        parent, name = _split(path)
        folder = self._folders.get(parent) or self._known_elsewhere(parent)
        if folder is None:
            # How it is to be come by, if at all, is for the walk from above to say.
            while parent != root and parent not in self._folders:
                parent = _split(parent)[0]
            self._look_at_folder(parent, root)
            return
        path, root = join(folder.path, name), self._root_of(folder.path) or root
        try:
            is_folder = stat.S_ISDIR(Path(path).stat().st_mode)
        except OSError as error:
            if not says_what_is_there(error):
                self._problems[path] = FolderProblem(path, sentence_of(error, path))
                return
            is_folder = False
        if not is_folder:
            self._forget_below(path)
            self._look_at_file(folder, name)
            return
        if folder.records.pop(name, None) is not None:
            self._reassemble(folder)
        # Whether a link to a folder is followed is for the walk from above to say, too.
        self._look_at_folder(folder.path if Path(path).is_symlink() else path, root)

    def _root_of(self, path: str) -> str | None:
        """The configured folder by which a path is come by; ``None`` for one outside, or hidden."""
        for root in self._roots:
            if is_within(path, root) and not any(part.startswith(".") for part in _inner(path, root)):
                return root
        return None

    def _known_elsewhere(self, path: str) -> _Folder | None:
        """The folder that is known by another path than this one: through a link, or by a root inside another."""
        identity = _folder_identity(path)
        if identity is None:
            return None
        return next(
            (
                folder
                for folder in self._folders.values()
                if folder.identity == identity and _folder_identity(folder.path) == identity
            ),
            None,
        )

    def _look_at_folder(self, path: str, root: str) -> None:
        depth = len(_inner(path, root))
        if depth > MAX_DEPTH:
            return
        elsewhere = {
            folder.identity for name, folder in self._folders.items() if folder.identity and not is_within(name, path)
        }
        walk = self._walk(elsewhere)
        found = {listing.path: self._take_listing(listing, walk) for listing in walk.listings([(path, depth)])}
        found = self._still_known(walk) | found
        self._pending.everything |= walk.met_again or any(
            is_within(other, path) for other in self._roots if other != root
        )
        self._forget_below(path, found)
        self._folders.update(found)
        self._problems.update({problem.path: problem for problem in walk.problems})
        self._pending.all_links = True

    def _forget_below(self, path: str, found: Collection[str] = ()) -> None:
        self._pending.folders = True
        for known in [known for known in self._folders if is_within(known, path) and known not in found]:
            del self._folders[known]
            self._pending.all_links = True
            self._last = None
        self._problems = {name: problem for name, problem in self._problems.items() if not is_within(name, path)}

    def _look_at_file(self, folder: _Folder, name: str) -> None:
        path = join(folder.path, name)
        if is_model_filename(name):
            self._files_seen += 1
            if self._looked_anew(folder, name, self._walk()):
                self._reassemble(folder)
        # No event comes from a link whose file changed (Hugging Face's cache has such).
        self._pending.link_targets.add(os.path.realpath(path))
        # A link by whose way others lead may have come or gone. A folder that is gone was forgotten before.
        was_link = name in folder.other_links or (is_model_filename(name) and not os.path.lexists(path))
        folder.other_links.discard(name)
        if Path(path).is_symlink():
            folder.other_links.add(name)
        self._pending.all_links |= was_link or name in folder.other_links

    def _look_at_links(self) -> None:
        pending = self._pending
        if pending.all_links and any(folder.has_linked_folders for folder in self._folders.values()):
            # Which of several ways to a folder counts is decided by a walk over all of them.
            pending.everything = True
        if pending.everything or not (pending.all_links or pending.link_targets):
            return
        walk = self._walk()
        for folder in self._folders.values():
            if folder.links and self._is_silent(folder.path):
                continue
            changed = False
            for link in folder.links:
                if pending.all_links or link.link_target in pending.link_targets:
                    changed |= self._looked_anew(folder, link.filename, walk)
            if changed:
                self._reassemble(folder)

    def _looked_anew(self, folder: _Folder, name: str, walk: Walk) -> bool:
        """Look at one file, and tell whether anything about it is new."""
        path = join(folder.path, name)
        known = folder.records.get(name)
        entry = entry_of(path)
        if entry is not None and entry.is_link and _is_folder(path):
            self._pending.everything = True
            entry = None
        if entry is None:
            return folder.records.pop(name, None) is not None
        control = path + CONTROL_SUFFIX
        downloading = os.path.lexists(control) and not _is_folder(control)
        record = self._looker.record(entry, path, known, walk, downloading=downloading)
        folder.records[name] = record
        return record is not known

    def _take_listing(self, listing: Listing, walk: Walk) -> _Folder:
        folder = self._folders.get(listing.path)
        if folder is None:
            folder = _Folder(listing.path, self._assembly(listing.path))
            self._last = None
        folder.identity = listing.identity
        folder.has_linked_folders = bool(listing.linked_folders)
        folder.other_links = {*listing.linked_folders, *listing.other_links}
        records = {name: folder.records[name] for name in listing.unread if name in folder.records}
        changed = len(listing.entries) + len(records) != len(folder.records)
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
        folder.links = [record for record in folder.records.values() if record.link_target is not None]
        folder.unsettled = [record.path for record in folder.records.values() if not record.settled]
        folder.growing = dict(_growing(folder.records.values()))
        before, samples = folder.assembly.candidates, folder.assembly.samples
        folder.assembly.update(folder.records.values())
        if folder.assembly.candidates != before or folder.assembly.samples != samples:
            self._last = None

    def _assembly(self, path: str) -> FolderAssembly:
        root = next((root for root in self._roots if is_within(path, root)), path)
        # The configured folder's own name may name its models (".../Qwen3-8B-GGUF"); what is above it does not.
        hints = [*reversed(_inner(path, root)), root.rpartition("/")[2]][:_MAX_HINTS]
        return FolderAssembly(path, hints, self._thresholds)


def _growing(records: Iterable[FileRecord]) -> Iterator[tuple[str, int]]:
    for record in records:
        if record.status is ModelStatus.INCOMPLETE and record.identity is not None:
            required = record.header.required_size if record.header is not None else 1
            if record.identity.size < required:
                yield record.link_target or record.path, required


def _inner(path: str, root: str) -> list[str]:
    """The names on the way from a configured folder to a path in it."""
    return [part for part in path[len(root) :].split("/") if part]


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent or "/", name


def _absolute(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())


def _is_folder(path: str) -> bool:
    return _folder_identity(path) is not None


def _folder_identity(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _outermost(paths: Iterable[str]) -> list[str]:
    """Leave out what lies below another of the paths."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not kept or not is_within(path, kept[-1]):
            kept.append(path)
    return kept
