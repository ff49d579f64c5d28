"""Looking at the files that a folder lists, as far as the last look does not hold any more."""

import os
import stat
from dataclasses import replace
from pathlib import Path

from magi_agent.discovery.access import shown
from magi_agent.discovery.answering import Whereabouts
from magi_agent.discovery.files import FileRecord, examine, identity_of, sentence_of
from magi_agent.discovery.folders import Entry, Walk
from magi_agent.discovery.header_cache import HeaderCache
from magi_agent.vocabulary import ModelStatus


class Looker:
    """Looks at files and counts the headers it had to read."""

    def __init__(self, cache: HeaderCache, whereabouts: Whereabouts) -> None:
        self._cache = cache
        self._whereabouts = whereabouts
        self.headers_read = 0

    def record(self, entry: Entry, path: str, known: FileRecord | None, walk: Walk, *, downloading: bool) -> FileRecord:
        """Return the known record where it still holds, else look at the file."""
        if entry.is_link or entry.status is None:
            return self._link(path, entry.name, known, walk, downloading=downloading)
        if known is not None and known.settled and not downloading and known.link_target is None:
            identity, status = known.identity, entry.status
            if (
                identity is not None
                and identity.mtime_ns == status.st_mtime_ns
                and identity.size == status.st_size
                and identity.inode == status.st_ino
                and identity.device == status.st_dev
                and known.changed_ns == status.st_ctime_ns
            ):
                return known
        return self._same(known, self._examine(path, downloading))

    def _link(self, path: str, name: str, known: FileRecord | None, walk: Walk, *, downloading: bool) -> FileRecord:
        target = link = None
        self._whereabouts.at(path)
        try:
            link = identity_of(os.lstat(path))
            status = Path(path).stat()
            identity = identity_of(status)
            if (
                known is not None
                and known.settled
                and not downloading
                and (known.identity, known.link_identity, known.changed_ns) == (identity, link, status.st_ctime_ns)
            ):
                return known
            target = os.path.realpath(path)
        except OSError as error:
            target = os.path.realpath(path)
            problem = sentence_of(error, path)
            if isinstance(error, FileNotFoundError):
                problem = f"the link leads to {shown(target)}, which is not there"
            broken = FileRecord(path, name, None, None, ModelStatus.INVALID, problem, True, target, link)
            return self._same(known, broken)
        if not walk.within_roots(target):
            folder = target.rpartition("/")[0] or "/"
            problem = (
                f"the link leads to {shown(target)}, outside the configured folders; "
                f"to use it, add {shown(folder)} to model_scan_path"
            )
            outside = FileRecord(path, name, identity, None, ModelStatus.INVALID, problem, True, target, link)
            return self._same(known, outside)
        record = replace(self._examine(path, downloading), link_target=target, link_identity=link)
        return self._same(known, record)

    def _examine(self, path: str, downloading: bool) -> FileRecord:
        self._whereabouts.at(path)
        record = examine(path, self._cache, downloading=downloading)
        self.headers_read += record.from_file
        return record

    @staticmethod
    def _same(known: FileRecord | None, seen: FileRecord) -> FileRecord:
        """Return the known record if a new look found nothing else, so that nothing is made anew for it."""
        return known if known is not None and known.tells_the_same(seen) else seen


def entry_of(path: str) -> Entry | None:
    """Return one file as its folder would list it; ``None`` if it is not there, or neither a file nor a link."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    name = path.rpartition("/")[2]
    if stat.S_ISLNK(status.st_mode):
        return Entry(name, is_link=True, status=None)
    return Entry(name, is_link=False, status=status) if stat.S_ISREG(status.st_mode) else None
