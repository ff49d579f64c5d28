"""Headers read before, kept across starts so that a start does not read every header again.

The file has two lines of JSON: what it is, with a digest, and the entries. It holds nothing that cannot be read
again, so a file that is damaged or of another version is dropped.
"""

import json
import logging
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.discovery.facts import FileIdentity
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.vocabulary import ThinkingMode

_LOG = logging.getLogger(__name__)

VERSION = 1
"""To be raised whenever the same header would be read to other facts."""
MAX_ENTRIES = 100_000
MAX_FILE_BYTES = 512 * 1024 * 1024

_FIELDS = tuple(field.name for field in fields(HeaderFacts))
_THINKING_MODE = _FIELDS.index("thinking_mode")


class HeaderCache:
    """Facts by file identity. Used from one thread."""

    def __init__(self, path: Path | None) -> None:
        """Begin with what the file at ``path`` holds; ``None`` keeps nothing on disk."""
        self._path = path
        self._known: dict[FileIdentity, HeaderFacts] = {}
        self._changed = False
        if path is not None:
            self._load(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, identity: FileIdentity) -> HeaderFacts | None:
        """Return the facts of the file with this identity, if its header was read before."""
        return self._known.get(identity)

    def put(self, identity: FileIdentity, facts: HeaderFacts) -> None:
        """Remember a header. Beyond ``MAX_ENTRIES`` the oldest is forgotten."""
        if self._known.get(identity) == facts:
            return
        if len(self._known) >= MAX_ENTRIES:
            del self._known[next(iter(self._known))]
        self._known[identity] = facts
        self._changed = True

    def keep_only(self, identities: set[FileIdentity]) -> None:
        """Forget every file that is not among these."""
        gone = self._known.keys() - identities
        for identity in gone:
            del self._known[identity]
        self._changed = self._changed or bool(gone)

    def save(self) -> None:
        """Write the file if anything changed. A failure is logged: the cache only saves time."""
        if self._path is None or not self._changed:
            return
        entries = [
            [identity.device, identity.inode, identity.size, identity.mtime_ns, *_row(facts)]
            for identity, facts in self._known.items()
        ]
        body = json.dumps(entries, separators=(",", ":"))
        head = {"magi_header_cache": VERSION, "fields": list(_FIELDS), "digest": _digest(body)}
        try:
            write_atomically(self._path, f"{json.dumps(head)}\n{body}\n".encode(), durable=False)
        except OSError as error:
            _LOG.warning("cannot write the header cache %s: %s", self._path, error.strerror)
            return
        self._changed = False

    def _load(self, path: Path) -> None:
        remove_leftovers(path)
        try:
            with path.open(encoding="utf-8") as file:
                head, body = file.readline(MAX_FILE_BYTES), file.readline(MAX_FILE_BYTES)
            self._known = _entries(json.loads(head), body.rstrip("\n"))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._changed = True
            _LOG.warning("the header cache %s is not used, and will be written anew: %s", path, error)


def _entries(head: Any, body: str) -> dict[FileIdentity, HeaderFacts]:
    if not isinstance(head, dict) or head.get("magi_header_cache") != VERSION or head.get("fields") != list(_FIELDS):
        raise ValueError("it is of another version")
    if head.get("digest") != _digest(body):
        raise ValueError("it is damaged")
    known: dict[FileIdentity, HeaderFacts] = {}
    for device, inode, size, mtime_ns, *row in json.loads(body):
        values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in row]
        values[_THINKING_MODE] = ThinkingMode(values[_THINKING_MODE])
        known[FileIdentity(device, inode, size, mtime_ns)] = HeaderFacts(*values)
    return known


def _row(facts: HeaderFacts) -> list[object]:
    return [getattr(facts, name) for name in _FIELDS]


def _digest(body: str) -> str:
    return blake2b(body.encode(), digest_size=16).hexdigest()
