"""The units that match a pattern, kept as systemd has them.

Signals are applied as they come: ``PropertiesChanged`` carries most of what changed. Whatever a signal leaves open
(a new unit, a new start, a reload of systemd) is marked, and ``settle`` reads it. Answers are put in order with
signals by being applied at the moment they arrive.

A unit is read only after systemd listed it: asking for the properties of a unit that is not loaded loads a stub of
it, whose own ``UnitNew`` would make us ask again, for ever.
"""

import asyncio
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Final

from magi_agent.systemd.bus import Bus, Reply, Signal
from magi_agent.systemd.status import (
    SERVICE_PROPERTIES,
    UNIT_PROPERTIES,
    UnitChange,
    UnitStatus,
    unit_path,
    unit_status,
)

SYSTEMD: Final = "org.freedesktop.systemd1"
MANAGER_PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
UNIT: Final = "org.freedesktop.systemd1.Unit"
SERVICE: Final = "org.freedesktop.systemd1.Service"
SLICE: Final = "org.freedesktop.systemd1.Slice"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

_WANTED: Final[Mapping[str, frozenset[str]]] = {UNIT: UNIT_PROPERTIES, SERVICE: SERVICE_PROPERTIES}
_SUMMARY: Final = ("LoadState", "ActiveState", "SubState")


class UnitTable:
    """Follows the units whose names match ``pattern`` (a shell pattern).

    ``publish`` is called from the event loop for every change, in order; ``units`` already holds the new state then.
    """

    def __init__(self, pattern: str, publish: Callable[[UnitChange], None]) -> None:
        self.units: dict[str, UnitStatus] = {}
        self.wake = asyncio.Event()
        self._pattern = pattern
        self._publish = publish
        self._raw: dict[str, dict[str, dict[str, object]]] = {}
        self._names: dict[str, str] = {}
        self._reading: tuple[str, dict[str, dict[str, object]]] | None = None
        self._one_reader = asyncio.Lock()
        self._stale: set[str] = set()
        self._list_all = False
        self._reloading = False

    def doubt_everything(self) -> None:
        """Have ``settle`` read every unit again."""
        self._reloading = False
        self._list_all = True
        self._stale.update(self.units)
        self.wake.set()

    def check(self) -> None:
        """Have ``settle`` list the units, and read those that are not as we have them."""
        self._list_all = True
        self.wake.set()

    def take(self, signal: Signal) -> None:
        """Apply a signal of systemd's; signals about other units are ignored."""
        match signal.member, signal.body:
            case "PropertiesChanged", (str(interface), dict(changed), *_) if interface in _WANTED:
                self._carried(signal.path, interface, changed)
            case "UnitNew", (str(name), *_) if fnmatchcase(name, self._pattern):
                self._mark(name)
            case "UnitRemoved", (str(name), *_) if not self._reloading:
                self._drop(name)
            case "Reloading", (bool(begins), *_):
                # During a reload systemd announces every unit as removed, then as new. They run on all the while.
                if not begins:
                    self.doubt_everything()
                self._reloading = begins
            case _:
                pass

    async def settle(self, bus: Bus) -> None:
        """Read whatever is marked, until nothing is. Raises ``BusError``."""
        while self._list_all or self._stale:
            if self._list_all:
                await bus.call(
                    SYSTEMD, MANAGER_PATH, MANAGER, "ListUnitsByPatterns", "asas", [], [self._pattern],
                    at_reply=self._listed,
                )  # fmt: skip
            for name in sorted(self._stale):
                await self.read(bus, name)
        self.wake.clear()

    async def read(self, bus: Bus, name: str) -> UnitStatus | None:
        """Read one unit now and return it, ``None`` when systemd does not have it. Raises ``BusError``."""
        async with self._one_reader:
            return await self._read(bus, name)

    async def read_marked(self, bus: Bus, name: str) -> UnitStatus | None:
        """Return one unit, reading it only if it is not known or marked. Raises ``BusError``."""
        if name in self._stale or name not in self.units:
            return await self.read(bus, name)
        return self.units.get(name)

    async def _read(self, bus: Bus, name: str) -> UnitStatus | None:
        loaded = False

        def listed(reply: Reply) -> None:
            nonlocal loaded
            loaded = any(row[0] == name and row[2] != "not-found" for row in _rows(reply))
            self._stale.discard(name)
            if not loaded:
                self._drop(name)

        pattern = name.replace("\\", "\\\\")
        await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "ListUnitsByPatterns", "asas", [], [pattern], at_reply=listed)
        if not loaded:
            return None
        path = unit_path(name)
        read: dict[str, dict[str, object]] = {}

        def take_unit(reply: Reply) -> None:
            read[UNIT] = _chosen(UNIT, reply[0])

        def take_service(reply: Reply) -> None:
            # From here on signals find the unit in the table, before the task that reads goes on.
            self._reading = None
            if read[UNIT].get("LoadState") == "not-found":
                self._drop(name)
                return
            read[SERVICE] = _chosen(SERVICE, reply[0])
            self._names[path] = name
            self._raw[name] = read
            self._update(name)

        self._reading = (path, read)
        try:
            # In this order: a start between the two shows by the signal about its InvocationID, which the unit's part
            # does not have then. The other way round, that would be there, and the new cgroup be missing.
            await bus.call(SYSTEMD, path, PROPERTIES, "GetAll", "s", UNIT, at_reply=take_unit)
            await bus.call(SYSTEMD, path, PROPERTIES, "GetAll", "s", SERVICE, at_reply=take_service)
        finally:
            self._reading = None
        return self.units.get(name)

    def _carried(self, path: str, interface: str, changed: Mapping[object, object]) -> None:
        if self._reading is not None and self._reading[0] == path and interface in self._reading[1]:
            self._reading[1][interface].update(_chosen(interface, changed))
        name = self._names.get(path)
        if name is None:
            return
        raw = self._raw[name]
        before = raw[UNIT].get("InvocationID")
        raw[interface].update(_chosen(interface, changed))
        if raw[UNIT].get("InvocationID") != before:
            # A new start: its cgroup and command line come with no signal.
            self._mark(name)
        self._update(name)

    def _listed(self, reply: Reply) -> None:
        self._list_all = False
        rows = {str(row[0]): row for row in _rows(reply) if row[2] != "not-found"}
        for name in [known for known in self.units if known not in rows]:
            self._drop(name)
        for name, row in rows.items():
            raw = self._raw.get(name)
            if raw is None or [raw[UNIT].get(key) for key in _SUMMARY] != row[2:5]:
                self._stale.add(name)

    def _mark(self, name: str) -> None:
        self._stale.add(name)
        self.wake.set()

    def _update(self, name: str) -> None:
        before = self.units.get(name)
        after = unit_status(name, self._raw[name][UNIT], self._raw[name][SERVICE])
        if after != before:
            self.units[name] = after
            self._publish(UnitChange(name, before, after))

    def _drop(self, name: str) -> None:
        self._stale.discard(name)
        self._raw.pop(name, None)
        self._names.pop(unit_path(name), None)
        before = self.units.pop(name, None)
        if before is not None:
            self._publish(UnitChange(name, before, None))


def _rows(reply: Reply) -> list[list[object]]:
    rows = reply[0]
    return [row for row in rows if isinstance(row, list) and len(row) >= 5] if isinstance(rows, list) else []


def _chosen(interface: str, values: object) -> dict[str, object]:
    if not isinstance(values, Mapping):
        return {}
    wanted = _WANTED[interface]
    return {str(key): value for key, value in values.items() if key in wanted}
