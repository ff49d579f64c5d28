"""Files that are being written: which of the many events about them are worth a look.

The header tells the size a file will have. Until it is reached, an event costs one ``stat`` and nothing else; the
event after which it is reached is worth a look at once. A file that stops growing is worth one too: its header may
have become another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FIRST_REST: Final = 1.0
_LONGEST_REST: Final = 30.0
_LONG: Final = 1.0


@dataclass(slots=True)
class _Held:
    """What was held back about one file."""

    size: int  # bytes
    since: float
    grew_at: float
    rest: float = _FIRST_REST  # seconds without growth after which it is looked at anyway
    told: bool = False  # since it grew last


class GrowingFiles:
    """Holds back events about files that have not reached their size. Moments are in seconds of one clock."""

    def __init__(self) -> None:
        self._required: Mapping[str, int] = {}
        self._held: dict[str, _Held] = {}

    def expect(self, required: Mapping[str, int]) -> None:
        """Hold back, from now on, what is heard of these paths before each has its size in bytes."""
        self._required = required
        self._held = {path: held for path, held in self._held.items() if path in required}

    def worth_a_look(self, paths: Iterable[str], now: float) -> set[str]:
        """Leave out, of the paths that something was heard of, files that are still growing."""
        return {path for path in paths if path not in self._required or not self._grows(path, now)}

    def at_rest(self, now: float) -> set[str]:
        """The files that have not grown for a while, each once, after ever longer whiles."""
        rested = set()
        for path, held in self._held.items():
            if not held.told and now - held.grew_at >= held.rest:
                held.told = True
                held.rest = min(2 * held.rest, _LONGEST_REST)
                rested.add(path)
        return rested

    def in_folder(self, folder: str) -> list[str]:
        """The files in one folder that have not reached their size."""
        return [path for path in self._required if path.rpartition("/")[0] == folder]

    def growing_folders(self, now: float) -> set[str]:
        """The folders in which files have been growing for longer than a moment, and do."""
        return {
            path.rpartition("/")[0]
            for path, held in self._held.items()
            if held.grew_at - held.since > _LONG and now - held.grew_at < _FIRST_REST
        }

    def _grows(self, path: str, now: float) -> bool:
        held = self._held.get(path)
        try:
            size = Path(path).stat().st_size
        except OSError:
            size = -1
        if not (held.size if held else 0) <= size < self._required[path]:
            self._held.pop(path, None)
            return False
        if held is None:
            self._held[path] = _Held(size, now, now)
        elif size > held.size:
            if held.told:
                held.since, held.told = now, False
            held.size, held.grew_at = size, now
        return True
