"""Looking at one GGUF file: its header, whether all of it is there, and if not, why.

A file is whole when its header can be read to the end, the tensors the header lists lie inside the file, and no part
of them is a hole. A copy in progress fails the second test; a preallocated download, which has its full size from the
start, fails the first or the third: ``lseek(SEEK_HOLE)`` reports space that was reserved and never written as a hole
(ext4, XFS, btrfs, tmpfs and others; a file system that cannot tell reports none; and what was read once, as the header
was, may count as written). Small holes in a file that nobody
has touched for a while are runs of zeros left out by a copying program, and do no harm.
"""

import errno
import logging
import operator
import os
import stat
import time
from dataclasses import dataclass, replace

from magi_agent.discovery.access import denial, shown
from magi_agent.discovery.facts import FileIdentity
from magi_agent.discovery.header_cache import HeaderCache
from magi_agent.gguf.errors import GgufError, TruncatedHeader
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.gguf.reading import read_facts
from magi_agent.gguf.sample import read_sample
from magi_agent.vocabulary import ModelStatus

_LOG = logging.getLogger(__name__)
_REST_SECONDS = 60.0
_HOLES_AT_REST = 0.01  # of the file
_MAX_HOLES = 64
# Clocks of file systems tick every few milliseconds: a file may change twice within one modification time.
_TICK_SECONDS = 0.02
_CHANGES_WHILE_READ = 3
_IN_PROGRESS = "a part of the file has not been written yet: a copy or download in progress, or one that was broken off"


@dataclass(frozen=True, slots=True, eq=False)
class FileRecord:
    """What one look at one file found. Records are compared by being the same object."""

    path: str  # absolute, as it was found; surrogate-escaped where it is not UTF-8
    filename: str
    identity: FileIdentity | None  # None where even that could not be had
    header: HeaderFacts | None
    status: ModelStatus  # OK, INCOMPLETE or INVALID
    problem: str | None
    settled: bool  # False: look again next time, even if the identity is the same
    link_target: str | None = None  # the real path, of a symbolic link
    link_identity: FileIdentity | None = None  # of the link itself
    changed_ns: int | None = None  # of the inode: unlike the identity, it tells that the permissions are others
    from_file: bool = False  # the header was read from the file, not remembered

    def tells_the_same(self, other: "FileRecord") -> bool:
        """Tell whether another look found nothing new."""
        return _told_by(self) == _told_by(other) and self.header == other.header


_told_by = operator.attrgetter("identity", "status", "problem", "settled", "link_target", "link_identity", "changed_ns")


def examine(path: str, cache: HeaderCache, *, downloading: bool = False) -> FileRecord:
    """Look at the file; never raises for what is wrong with it.

    ``downloading`` says that a download program's control file lies beside it (aria2's ``x.gguf.aria2``).
    """
    filename = path.rpartition("/")[2]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        return FileRecord(path, filename, None, None, ModelStatus.INVALID, sentence_of(error, path), settled=False)
    try:
        return _examine_open(fd, path, filename, cache, downloading)
    except OSError as error:
        problem = f"it cannot be read: {error.strerror}"
        return FileRecord(path, filename, None, None, ModelStatus.INVALID, problem, settled=False)
    finally:
        os.close(fd)


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return what a file is told by without reading it."""
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def sentence_of(error: OSError, path: str) -> str:
    """Say in one sentence why the operating system would not open a path."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return denial(path)
    if error.errno == errno.ENOENT:
        return "it is not there any more"
    if error.errno == errno.ELOOP:
        return "its links lead in a circle"
    return f"it cannot be opened: {error.strerror}"


def _examine_open(fd: int, path: str, filename: str, cache: HeaderCache, downloading: bool) -> FileRecord:
    record: FileRecord | None = None
    for _ in range(_CHANGES_WHILE_READ):
        before = os.fstat(fd)
        record = _look(fd, before, path, filename, cache, downloading)
        if identity_of(os.fstat(fd)) == record.identity:
            return record
    # It changes as fast as we read. What was seen is not to be relied on, and will be looked at again.
    assert record is not None  # noqa: S101  # the loop runs at least once
    return FileRecord(path, filename, record.identity, None, ModelStatus.INCOMPLETE, _IN_PROGRESS, settled=False)


def _look(
    fd: int, status: os.stat_result, path: str, filename: str, cache: HeaderCache, downloading: bool
) -> FileRecord:
    identity = identity_of(status)
    age = time.time() - status.st_mtime
    racy = abs(age) < _TICK_SECONDS
    facts = cache.get(identity)
    remembered = facts is not None
    state, problem, settled = _precluded(status)
    if state is ModelStatus.OK and facts is None:
        try:
            facts = read_facts(fd)
        except TruncatedHeader as error:
            # Zeros may be overwritten in place, without a change of size or, by mmap, of the modification time.
            state, problem, settled = ModelStatus.INCOMPLETE, error.message, False
        except GgufError as error:
            state, problem = ModelStatus.INVALID, error.message
    if state is ModelStatus.OK and facts is not None:
        state, problem, settled = _wholeness(fd, status.st_size, facts.required_size, age, filename, downloading)
    if state is ModelStatus.OK and facts is not None:
        if facts.sample is None:
            facts = _sampled(fd, facts, path)
        if not racy:
            cache.put(identity, facts)
    read = not remembered and stat.S_ISREG(status.st_mode) and status.st_size > 0
    return FileRecord(
        path,
        filename,
        identity,
        facts,
        state,
        problem,
        settled and not racy,
        from_file=read,
        changed_ns=status.st_ctime_ns,
    )


def _sampled(fd: int, facts: HeaderFacts, path: str) -> HeaderFacts:
    """The facts with a sample of the data, if that can be read; a model is none the worse without."""
    try:
        return replace(facts, sample=read_sample(fd, facts.required_size))
    except OSError as error:
        _LOG.debug("no sample of %s: %s", path.encode(errors="replace").decode(), error.strerror)
        return facts


def _precluded(status: os.stat_result) -> tuple[ModelStatus, str | None, bool]:
    """Judge a file without reading it. The last value says whether the judgement stands until the file changes."""
    if not stat.S_ISREG(status.st_mode):
        return ModelStatus.INVALID, "it is not a regular file", True
    if status.st_size == 0:
        return ModelStatus.INCOMPLETE, "the file is empty", True
    return ModelStatus.OK, None, True


def _wholeness(
    fd: int, size: int, required: int, age: float, filename: str, downloading: bool
) -> tuple[ModelStatus, str | None, bool]:
    if size < required:
        return ModelStatus.INCOMPLETE, f"{_size(size)} of {_size(required)} are there", True
    if downloading:
        problem = f"a download is in progress: {shown(filename)}.aria2 lies beside it"
        return ModelStatus.INCOMPLETE, problem, False
    holes, harmless = _holes(fd, required, age)
    if holes and not harmless:
        return ModelStatus.INCOMPLETE, _IN_PROGRESS, False
    return ModelStatus.OK, None, True


def _holes(fd: int, required: int, age: float) -> tuple[int, bool]:
    """Return the bytes of holes among the first ``required``, and whether they may be taken for zeros."""
    total = 0
    position = 0
    try:
        for _ in range(_MAX_HOLES):
            begin = os.lseek(fd, position, os.SEEK_HOLE)
            if begin >= required:
                return total, age > _REST_SECONDS and total <= required * _HOLES_AT_REST
            try:
                position = os.lseek(fd, begin, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                position = required
            if position >= required:
                return total + required - begin, False  # the end of the data is missing
            total += position - begin
    except OSError:
        return 0, True  # this file system does not know
    return total, age > _REST_SECONDS and total <= required * _HOLES_AT_REST


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1_000_000_000 else f"{count:,} bytes"
