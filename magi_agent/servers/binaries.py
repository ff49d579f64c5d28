"""The llama-server binaries: which file each one is now, and the options it has.

A binary is told from another by device, inode, size and time of change of the file behind its path. The options are
asked of it once, in a unit with the servers' sandbox, and kept on disk for the next agent.
"""

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from weakref import WeakValueDictionary

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.errors import MagiError
from magi_agent.runtime_settings.known_options import MAX_HELP, KnownOptions, read_help

_LOG: Final = logging.getLogger(__name__)
_ASK_AGAIN: Final = 30.0
"""Seconds after which a binary that did not answer is asked again."""
_MOST_KEPT: Final = 8
"""Binaries that are remembered; those behind paths in use always are."""
_MOST_STEPS: Final = 400
"""Parts of a path that are followed, those of the links in it included."""
_MAX_BYTES: Final = 8 * _MOST_KEPT * MAX_HELP


class Prober(Protocol):
    """Runs a binary for a moment."""

    async def probe(self, binary: Path) -> str:
        """What ``binary --help`` prints. Raises ``MagiError``."""


@dataclass(frozen=True, slots=True)
class BinaryFile:
    """The file behind a binary's path."""

    identity: str
    """Differs for every other file, and for other content."""
    placed_at: float
    """When the file, or a link that leads to it, came to be here as it is; seconds since 1970."""


class Binaries:
    """What is known of the binaries that servers run, or would run."""

    def __init__(self, prober: Prober, kept_in: Path) -> None:
        """``kept_in`` is the file that outlives the agent."""
        self._prober = prober
        self._path = kept_in
        self._files: dict[Path, BinaryFile | None] = {}
        self._options: dict[str, KnownOptions] = {}
        self._texts: dict[str, str] = {}
        self._silent: dict[str, float] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self) -> None:
        """Take up what an agent before this one was told. What cannot be read is asked again."""
        texts = await asyncio.to_thread(self._read)
        self._texts = texts
        self._options = {identity: read_help(text) for identity, text in texts.items()}

    async def look(self, binaries: Iterable[Path]) -> None:
        """See which files are behind some paths now."""
        paths = set(binaries)
        self._files |= await asyncio.to_thread(lambda: {path: _file_of(path) for path in paths})

    def file(self, binary: Path) -> BinaryFile | None:
        """The file behind a path as of the last look; ``None`` where there is none, or nobody has looked."""
        return self._files.get(binary)

    def options(self, binary: Path) -> KnownOptions | None:
        """The options of a binary, if it was asked."""
        file = self._files.get(binary)
        return self._options.get(file.identity) if file else None

    async def ask(self, binary: Path) -> KnownOptions | None:
        """The options of a binary, which is run for a moment if it was never asked; ``None`` if it does not say."""
        await self.look([binary])
        file = self._files.get(binary)
        if file is None or (known := self._options.get(file.identity)) is not None:
            return known if file else None
        # One that hangs holds up nobody who asks for another.
        async with self._turns.setdefault(file.identity, asyncio.Lock()):
            if (known := self._options.get(file.identity)) is not None:
                return known
            now = asyncio.get_running_loop().time()
            if now - self._silent.get(file.identity, -_ASK_AGAIN) < _ASK_AGAIN:
                return None
            try:
                text = await self._prober.probe(binary)
            except MagiError as error:
                self._silent[file.identity] = now
                _LOG.warning("%s does not say what it can do, so settings are passed on unchecked: %s", binary, error)
                return None
            known = read_help(text)
            if not known.options:
                self._silent[file.identity] = now
                _LOG.warning("%s --help lists no options; is it a llama-server?", binary)
                return None
            _LOG.info("%s has %d options", binary, len(known.options))
            await self._keep(file.identity, text, known)
            return known

    async def _keep(self, identity: str, text: str, known: KnownOptions) -> None:
        self._options[identity] = known
        self._texts[identity] = text
        in_use = {file.identity for file in self._files.values() if file}
        for former in [each for each in self._texts if each not in in_use]:
            if len(self._texts) <= _MOST_KEPT:
                break
            del self._texts[former], self._options[former]
        try:
            await asyncio.to_thread(write_atomically, self._path, json.dumps(self._texts).encode())
        except OSError as error:
            _LOG.warning("%s cannot be written, so binaries are asked again by the next agent: %s", self._path, error)

    def _read(self) -> dict[str, str]:
        remove_leftovers(self._path)
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(_MAX_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            _LOG.warning("%s cannot be read and is made anew: %s", self._path, error)
            return {}
        entries = document.items() if isinstance(document, dict) else ()
        return {identity: text for identity, text in entries if isinstance(text, str)}


def _file_of(path: Path) -> BinaryFile | None:
    try:
        status = path.stat()
        placed = max([status.st_ctime, *_link_times(path)])
    except (OSError, ValueError):
        return None
    return BinaryFile(f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}", placed)


def _link_times(path: Path) -> Iterator[float]:
    """When each link was made that leads to the file behind ``path``: to itself, or to a folder on the way."""
    place = Path(path.anchor)
    steps = [*path.parts[:0:-1]]
    for _ in range(_MOST_STEPS):
        if not steps:
            return
        step = place / steps.pop()
        if step.name == "..":
            place = place.parent
        elif step.is_symlink():
            yield step.lstat().st_ctime
            target = step.readlink()
            place = Path(target.anchor) if target.is_absolute() else place
            steps += [part for part in target.parts[::-1] if part != target.anchor]
        else:
            place = step
