"""Walking folders: which files may be models, and which folders there are. Nothing is opened here but folders."""

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from magi_agent.discovery.access import shown
from magi_agent.discovery.assembly import Problem
from magi_agent.discovery.files import sentence_of
from magi_agent.discovery.names import is_model_filename

MAX_DEPTH = 32
"""Folders below a configured one."""
MAX_FILES = 100_000
"""Model files in one scan."""
CONTROL_SUFFIX = ".aria2"
"""Of the file that lies beside a download while it is in progress (aria2's)."""
_SAYS_WHAT_IS_THERE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
)
"""The errors that are the state of a folder. Any other says that it could not be learned (EIO, ESTALE, ENOTCONN)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file whose name may be a model's, as its folder lists it."""

    name: str
    is_link: bool
    status: os.stat_result | None  # of the file itself; of a link, only whether and what it is comes later


@dataclass(slots=True)
class Listing:
    """One folder's contents, as far as they matter."""

    path: str
    depth: int
    identity: tuple[int, int]  # device and inode
    entries: list[Entry] = field(default_factory=list)
    downloading: set[str] = field(default_factory=set)  # names with a download program's control file beside them
    folders: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)  # names of which could not be learned what they are
    other_links: list[str] = field(default_factory=list)  # that neither lead to a folder nor have a model's name


class Walk:
    """One walk over the configured folders or a part of them. Each folder is listed once, however often it is linked.

    ``problems`` is filled on the way; nothing stops the walk. ``met_again`` tells whether a folder was come by twice.
    ``unread`` are the folders of which could not be learned what is in them now: what was known of them, and of what is
    below them, still holds.
    """

    def __init__(
        self,
        roots: Sequence[str],
        visited: set[tuple[int, int]] | None = None,
        silent: Collection[str] = (),
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``visited``: folders (device, inode) that are known and not to be listed again.

        ``silent`` are folders whose file system does not answer: they are not touched. ``at`` is told each folder
        before it is listed.
        """
        self.problems: list[Problem] = []
        self.unread: set[str] = set()
        self._silent = silent
        self._at = at
        self.visited = visited if visited is not None else set()
        self.met_again = False
        self._roots = frozenset(roots)
        self._real_roots = [root if root in silent else os.path.realpath(root) for root in roots]
        self._left = MAX_FILES

    def within_roots(self, real_path: str) -> bool:
        """Tell whether a resolved path lies in one of the configured folders."""
        return any(is_within(real_path, root) for root in self._real_roots)

    def listings(self, starts: Sequence[tuple[str, int]]) -> Iterator[Listing]:
        """List folders, each with its depth below a configured one, and all below them.

        Links to folders are followed last, and only where they lead to a folder inside the configured ones that the
        walk did not come by: so a file's path is the same on every walk.
        """
        pending = [*reversed(starts)]
        links: list[tuple[str, int]] = []
        while pending or links:
            if not pending:
                link, link_depth = links.pop(0)
                if not self._leads_inside(link):
                    continue
                pending.append((link, link_depth))
            path, depth = pending.pop()
            listing = self._list(path, depth)
            if listing is None:
                continue
            yield listing
            if depth >= MAX_DEPTH:
                if listing.folders:
                    self.problems.append(Problem(path, f"folders deeper than {MAX_DEPTH} levels are not scanned"))
                continue
            pending += [(join(path, name), depth + 1) for name in sorted(listing.folders, reverse=True)]
            links += [(join(path, name), depth + 1) for name in sorted(listing.linked_folders)]

    def _list(self, path: str, depth: int) -> Listing | None:
        listing: Listing | None = None
        if path in self._silent:
            self.unread.add(path)
            return None
        self._at(path)
        try:
            status = Path(path).stat()
            if not stat.S_ISDIR(status.st_mode):
                self.problems.append(Problem(path, "it is not a folder"))
                return None
            identity = (status.st_dev, status.st_ino)
            if identity in self.visited:
                self.met_again = True
                return None
            self.visited.add(identity)
            listing = Listing(path, depth, identity)
            with os.scandir(path) as entries:
                for entry in entries:
                    self._take(listing, entry)
        except FileNotFoundError:
            if path in self._roots:
                self.problems.append(Problem(path, "the folder does not exist"))
            return None
        except OSError as error:
            self.problems.append(Problem(path, f"the folder cannot be read: {sentence_of(error, path)}"))
            if not says_what_is_there(error):
                self.unread.add(path)
                return None
        return listing

    def _take(self, listing: Listing, entry: os.DirEntry[str]) -> None:
        name = entry.name
        if name.startswith("."):
            return
        try:
            if _is_folder(entry):
                (listing.linked_folders if entry.is_symlink() else listing.folders).append(name)
            elif is_model_filename(name):
                self._take_file(listing, entry)
            else:
                if name.endswith(CONTROL_SUFFIX) and is_model_filename(name.removesuffix(CONTROL_SUFFIX)):
                    listing.downloading.add(name.removesuffix(CONTROL_SUFFIX))
                if entry.is_symlink():
                    listing.other_links.append(name)
        except FileNotFoundError:
            return  # it was removed while the folder was read
        except OSError as error:
            path = join(listing.path, name)
            self.problems.append(Problem(path, sentence_of(error, path)))
            if not says_what_is_there(error):
                listing.unread.add(name)
                self.unread.add(path)

    def _take_file(self, listing: Listing, entry: os.DirEntry[str]) -> None:
        if self._left <= 0:
            if self._left == 0:
                self.problems.append(Problem(listing.path, f"more than {MAX_FILES} model files; the rest is left out"))
            self._left = -1
            return
        if entry.is_symlink():
            listing.entries.append(Entry(entry.name, is_link=True, status=None))
        else:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return
            listing.entries.append(Entry(entry.name, is_link=False, status=status))
        self._left -= 1

    def _leads_inside(self, link: str) -> bool:
        try:
            status = Path(link).stat()
        except OSError:
            return False
        if (status.st_dev, status.st_ino) in self.visited:
            return False
        target = os.path.realpath(link)
        if self.within_roots(target):
            return True
        self.problems.append(
            Problem(
                link,
                f"the link leads out of the configured folders; to scan it, add {shown(target)} to model_scan_path",
            )
        )
        return False


def says_what_is_there(error: OSError) -> bool:
    """Tell whether an error is the state of a file or folder, and does not just hide it."""
    return error.errno in _SAYS_WHAT_IS_THERE


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():
            return False  # it leads nowhere that can be reached; one with a model's name is listed, and says so
        raise


def is_within(path: str, folder: str) -> bool:
    """Tell whether a path is a folder or lies in it; both absolute and normalised."""
    return path == folder or path.startswith(folder if folder.endswith("/") else f"{folder}/")


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder."""
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"
