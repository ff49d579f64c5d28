"""Files that are being written: which of the many events about them are worth a look.

The header tells the size a model's file will have. Until it is reached, an event costs one ``stat`` and nothing else;
the event after which it is reached is worth a look at once. A file that stops growing is worth one too: its header may
have become another. Of other files, a download's for example, it is noted only that they grow, and where.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

_FIRST_REST: Final = 1.0
_LONGEST_REST: Final = 30.0
_LONG: Final = 1.0


@dataclass(slots=True)
class _Growth:
    """What is known of one file."""

    size: int  # bytes
    since: float
    grew_at: float
    rest: float = _FIRST_REST  # seconds without growth after which it is looked at anyway
    told: bool = False  # since it grew last


class GrowingFiles:
    """Holds back events about files that have not reached their size. Moments are in seconds of one clock."""

    def __init__(self) -> None:
        self._required: Mapping[str, int] = {}
        self._held: dict[str, _Growth] = {}
        self._others: dict[str, _Growth] = {}

    def expect(self, required: Mapping[str, int]) -> None:
        """Hold back, from now on, what is heard of these paths before each has its size in bytes."""
        self._required = required
        known = self._others | self._held
        self._held = {path: growth for path, growth in known.items() if path in required}
        self._others = {path: growth for path, growth in self._others.items() if path not in required}

    def worth_a_look(self, paths: Iterable[str], now: float) -> set[str]:
        """Leave out, of the paths that something was heard of, files that are still growing."""
        return {
            path
            for path in paths
            if path not in self._required or not _grows(self._held, path, self._required[path], now)
        }

    def note(self, paths: Iterable[str], now: float) -> None:
        """Note that files have been written to; those that are held back are left out."""
        for path in paths:
            if path not in self._required:
                _grows(self._others, path, math.inf, now)

    def look_into(self, folder: str, now: float) -> set[str]:
        """Ask for the sizes of the growing files in a folder, and return those that are worth a look."""
        self.note([path for path in self._others if _folder_of(path) == folder], now)
        return self.worth_a_look([path for path in self._required if _folder_of(path) == folder], now)

    def at_rest(self, now: float) -> set[str]:
        """The files held back that have not grown for a while, each once, after ever longer whiles."""
        self._others = {path: growth for path, growth in self._others.items() if now - growth.grew_at < _FIRST_REST}
        rested = set()
        for path, growth in self._held.items():
            if not growth.told and now - growth.grew_at >= growth.rest:
                growth.told = True
                growth.rest = min(2 * growth.rest, _LONGEST_REST)
                rested.add(path)
        return rested

    def rests_at(self) -> float:
        """When ``at_rest`` may give the next one, if none of them grows until then."""
        moments = (growth.grew_at + growth.rest for growth in self._held.values() if not growth.told)
        return min(moments, default=math.inf)

    def folders(self, now: float) -> set[str]:
        """The folders in which files have been growing for longer than a moment, and still do."""
        return set(self._growing_folders(now))

    def _growing_folders(self, now: float) -> Iterator[str]:
        for path, growth in chain(self._held.items(), self._others.items()):
            if growth.grew_at - growth.since > _LONG and now - growth.grew_at < _FIRST_REST:
                yield _folder_of(path)


def _grows(known: dict[str, _Growth], path: str, required: float, now: float) -> bool:
    """Whether the file is there, no shorter than before, and shorter than it will be."""
    growth = known.get(path)
    try:
        size = Path(path).stat().st_size
    except OSError:
        size = -1
    if not (growth.size if growth else 0) <= size < required:
        known.pop(path, None)
        return False
    if growth is None:
        known[path] = _Growth(size, now, now)
    elif size > growth.size:
        if growth.told:
            growth.since, growth.told = now, False
        growth.size, growth.grew_at = size, now
    return True


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]
