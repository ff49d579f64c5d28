"""What servers used of the host's memory that ran before, kept by what decides it: files, settings, binary.

What they had of GPUs is not kept: it is of one placement, and the next may be another.

The file ``memory.json`` in the state folder holds nothing that could not be measured again: one that cannot be read
is made anew. At most 500 entries are kept, those that were seen last.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.memory.need import Basis, MemoryNeed, Split
from magi_agent.memory.reported import Reported, refined

_LOG: Final = logging.getLogger(__name__)
MOST_KEPT: Final = 500
_VERSION: Final = 1
_MOST_BYTES: Final = 4 << 20
_SPLITS: Final = ("weights", "kv_cache", "recurrent_state", "compute", "output")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was seen of servers with the same files, settings and binary."""

    anonymous_at_ready: int | None = None
    """Bytes on the host when it was ready, before it had to do anything."""
    anonymous_later: int | None = None
    """The same, a while after."""
    reported: Reported | None = None


class MeasuredStore:
    """Measurements by key, in a file. Used from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Measurement] | None = None

    def load(self) -> None:
        """Take up what is in the file, if nothing was yet. What cannot be read is made anew."""
        self._known()

    def get(self, key: str) -> Measurement | None:
        """What was measured under this key."""
        return self._known().get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Keep a measurement, and write the file. A failure is logged: the next server is measured again."""
        known = self._known()
        if known.get(key) == measurement:
            return
        known.pop(key, None)
        known[key] = measurement
        while len(known) > MOST_KEPT:
            del known[next(iter(known))]
        document = {"version": _VERSION, "measured": {key: asdict(entry) for key, entry in known.items()}}
        try:
            write_atomically(self._path, json.dumps(document, separators=(",", ":")).encode(), durable=False)
        except OSError as error:
            _LOG.warning("%s cannot be written: %s", self._path, error.strerror)

    def _known(self) -> dict[str, Measurement]:
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def _read(self) -> dict[str, Measurement]:
        remove_leftovers(self._path)
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(_MOST_BYTES))
            if document["version"] != _VERSION:
                return {}
            return {key: _measurement(entry) for key, entry in list(document["measured"].items())[-MOST_KEPT:]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            _LOG.warning("%s cannot be read and is made anew: %s", self._path, error)
            return {}


def with_measured(need: MemoryNeed, measurement: Measurement | None) -> MemoryNeed:
    """An estimate, with what was reported and measured in place of what was estimated.

    When a server is ready it has touched little of the room for batches and outputs; the first long prompts do, so all
    of that room is added to what was measured then.
    """
    if measurement is None:
        return need
    if measurement.reported is not None:
        need = refined(need, measurement.reported)
    at_ready, later = measurement.anonymous_at_ready, measurement.anonymous_later
    if at_ready is None and later is None:
        return need
    measured = max(0 if at_ready is None else at_ready + need.compute.host + need.output.host, later or 0)
    return replace(need, measured_anonymous=measured, basis=Basis.MEASURED)


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    reported = entry["reported"]
    return Measurement(
        _number(entry["anonymous_at_ready"]),
        _number(entry["anonymous_later"]),
        None
        if reported is None
        else Reported(
            **{name: Split(int(reported[name]["host"]), int(reported[name]["gpu"])) for name in _SPLITS},
            mapped=int(reported["mapped"]),
        ),
    )


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
