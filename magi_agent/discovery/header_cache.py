"""Headers read before, kept across starts so that a start does not read every header again.

The file's first line says what it is. Every further one is a digest and, as JSON, some entries; a save appends one with
what is new, and so costs what changed, not what is known. The file holds nothing that cannot be read again: one of
another version is dropped, and of a damaged one what stands behind the damage. One of an earlier agent, that only lacks
what is taken of a file beside its header, is read and then written anew.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, get_origin

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.discovery.facts import FileIdentity
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.vocabulary import ThinkingMode

_LOG = logging.getLogger(__name__)

VERSION = 3
"""To be raised whenever the same header would be read to other facts."""
MAX_ENTRIES = 100_000
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_STALE = 1000
"""Entries in the file that are forgotten or overtaken, beyond as many as hold; then a save writes the file anew."""

_FIELDS = tuple(field.name for field in fields(HeaderFacts))
_EARLIER_FIELDS = _FIELDS[: _FIELDS.index("sample")]
_THINKING_MODE = _FIELDS.index("thinking_mode")
_TUPLES = tuple(number for number, field in enumerate(fields(HeaderFacts)) if get_origin(field.type) is tuple)
_WORDS = tuple(
    _FIELDS.index(name)
    for name in ("architecture", "general_type", "basename", "finetune", "version", "size_label", "quantization")
)
_DIGEST_BYTES = 16
_AT_ONCE = 64  # entries in a line: what is read or written is in memory twice, but never much of it
_identity_row = attrgetter(*(field.name for field in fields(FileIdentity)))
_facts_row = attrgetter(*_FIELDS)


class HeaderCache:
    """Facts by file identity. Used from one thread."""

    def __init__(self, path: Path | None) -> None:
        """Begin with what the file at ``path`` holds, read at the first use; ``None`` keeps nothing on disk."""
        self._path = path
        self._unsaved: set[FileIdentity] = set()
        self._written = 0  # entries in the file; none is appended where there are none
        self._outdated = False  # the file holds what appending cannot mend

    @cached_property
    def _known(self) -> dict[FileIdentity, HeaderFacts]:
        # Not read before it is needed: of many headers it takes a while, and whoever makes the cache may not wait.
        known: dict[FileIdentity, HeaderFacts] = {}
        if self._path is not None:
            self._load(self._path, known)
        return known

    def __len__(self) -> int:
        return len(self._known)

    def get(self, identity: FileIdentity) -> HeaderFacts | None:
        """Return the facts of the file with this identity, if its header was read before."""
        return self._known.get(identity)

    def put(self, identity: FileIdentity, facts: HeaderFacts) -> None:
        """Remember a header. Beyond ``MAX_ENTRIES`` the oldest is forgotten."""
        if self._known.get(identity) == facts:
            return
        self._known[identity] = facts
        _forget_oldest(self._known)
        if self._path is not None:
            self._unsaved.add(identity)

    def keep_only(self, identities: set[FileIdentity]) -> None:
        """Forget every file that is not among these."""
        gone = self._known.keys() - identities
        for identity in gone:
            del self._known[identity]
        self._outdated = self._outdated or bool(gone)

    def save(self) -> None:
        """Bring the file up to date if anything changed. A failure is logged: the cache only saves time."""
        if self._path is None or not (self._unsaved or self._outdated):
            return
        try:
            if self._outdated or not self._is_worth_keeping() or not self._append(self._path):
                write_atomically(self._path, _head(_FIELDS) + b"".join(_lines(self._known.items())), durable=False)
                self._written = len(self._known)
        except OSError as error:
            self._outdated = True  # half a line may stand at its end
            _LOG.warning("cannot write the header cache %s: %s", self._path, error.strerror)
            return
        self._unsaved.clear()
        self._outdated = False

    def _is_worth_keeping(self) -> bool:
        return 0 < self._written <= 2 * len(self._known) + MAX_STALE

    def _append(self, path: Path) -> bool:
        """Append what is not in the file yet; whether there is a file to append to."""
        new = [(identity, self._known[identity]) for identity in self._unsaved if identity in self._known]
        try:
            with path.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.writelines(_lines(new))
        except FileNotFoundError:
            return False
        self._written += len(new)
        return True

    def _load(self, path: Path, known: dict[FileIdentity, HeaderFacts]) -> None:
        remove_leftovers(path)
        try:
            with path.open("rb") as file:
                self._take(file, known)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            self._outdated = True
            _LOG.warning(
                "only %d headers of the header cache %s are used, and it will be written anew: %s",
                len(known),
                path,
                error,
            )

    def _take(self, file: BinaryIO, known: dict[FileIdentity, HeaderFacts]) -> None:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
        head = file.readline(len(_head(_FIELDS)))
        if head == _head(_EARLIER_FIELDS):
            self._outdated = True
        elif head != _head(_FIELDS):
            raise ValueError("it is of another version")
        for line in file:
            entries = _entries(line)
            known.update(entries)
            _forget_oldest(known)
            self._written += len(entries)


def _forget_oldest(known: dict[FileIdentity, HeaderFacts]) -> None:
    while len(known) > MAX_ENTRIES:
        del known[next(iter(known))]


def _head(names: Sequence[str]) -> bytes:
    return json.dumps({"magi_header_cache": VERSION, "fields": names}).encode() + b"\n"


def _lines(entries: Iterable[tuple[FileIdentity, HeaderFacts]]) -> Iterator[bytes]:
    rows = ((*_identity_row(identity), *_facts_row(facts)) for identity, facts in entries)
    while some := list(islice(rows, _AT_ONCE)):
        body = json.dumps(some, separators=(",", ":")).encode() + b"\n"
        yield _digest(body) + b" " + body


def _entries(line: bytes) -> dict[FileIdentity, HeaderFacts]:
    digest, _, body = line.partition(b" ")
    if digest != _digest(body):
        raise ValueError("it is damaged")
    entries: dict[FileIdentity, HeaderFacts] = {}
    for device, inode, size, mtime_ns, *row in json.loads(body):
        for number in _TUPLES:
            row[number] = tuple(row[number])
        for number in _WORDS:
            # Many headers have the same ones, which are kept once.
            row[number] = row[number] and sys.intern(row[number])
        row[_THINKING_MODE] = ThinkingMode(row[_THINKING_MODE])
        entries[FileIdentity(device, inode, size, mtime_ns)] = HeaderFacts(*row)
    return entries


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=_DIGEST_BYTES).hexdigest().encode()
