"""The table of units when something happens between two answers of systemd's.

A start in just that moment cannot be made for real, so systemd is played here; the other tests have a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from magi_agent.systemd.bus import Bus, Reply, Signal
from magi_agent.systemd.status import UnitChange, unit_path
from magi_agent.systemd.unit_table import PROPERTIES, SERVICE, UNIT, UnitTable

NAME = "systemdtest-played.service"
INVOCATION = bytes([7] * 16)
GROUP = "/the/group"


class PlayedSystemd:
    """A systemd with one unit, which starts after so many answers; the signals of it come `delay` answers later."""

    def __init__(self, starts_after: int, delay: int) -> None:
        self.changes: list[UnitChange] = []
        self.table = UnitTable("systemdtest-*", self.changes.append)
        self._until_start = starts_after
        self._until_signal = delay
        self._runs = False

    async def call(self, *words: Any, at_reply: Callable[[Reply], None]) -> Reply:
        """Answer as a bus does, and let time pass."""
        reply: Reply = (self._listing(),) if words[3] == "ListUnitsByPatterns" else (self._all(words[-1]),)
        at_reply(reply)
        self.pass_time()
        return reply

    def pass_time(self) -> None:
        if self._until_start > 0:
            self._until_start -= 1
            return
        self._runs = True
        self._until_signal -= 1
        if self._until_signal == -1:
            for interface, changed in ((SERVICE, {"MainPID": 42}), (UNIT, self._all(UNIT))):
                signal = Signal(":1.0", unit_path(NAME), PROPERTIES, "PropertiesChanged", (interface, changed, []))
                self.table.take(signal)

    def _listing(self) -> list[list[object]]:
        unit = self._all(UNIT)
        return [[NAME, "", "loaded", unit["ActiveState"], unit["SubState"], "", unit_path(NAME), 0, "", "/"]]

    def _all(self, interface: str) -> dict[str, object]:
        if interface == SERVICE:
            # No signal says that the control group changed.
            return {"MainPID": 42 if self._runs else 0, "ControlGroup": GROUP if self._runs else ""}
        states = {"ActiveState": "active", "SubState": "running"} if self._runs else {
            "ActiveState": "inactive", "SubState": "dead"
        }  # fmt: skip
        return {"LoadState": "loaded", **states, "InvocationID": INVOCATION if self._runs else bytes(16)}


@pytest.mark.parametrize("delay", range(5))
@pytest.mark.parametrize("starts_after", range(5))
async def test_a_unit_that_starts_while_it_is_read_is_known_whole(starts_after: int, delay: int) -> None:
    systemd = PlayedSystemd(starts_after, delay)
    bus = cast("Bus", systemd)

    systemd.table.doubt_everything()
    await systemd.table.settle(bus)
    for _ in range(10):
        systemd.pass_time()
    await systemd.table.settle(bus)

    unit = systemd.table.units[NAME]
    assert (unit.active_state, unit.main_pid, unit.invocation_id) == ("active", 42, INVOCATION.hex())
    assert unit.control_group == GROUP


@pytest.mark.parametrize("delay", range(5))
@pytest.mark.parametrize("starts_after", range(5))
async def test_a_unit_that_is_known_and_starts_again_is_known_whole(starts_after: int, delay: int) -> None:
    systemd = PlayedSystemd(100, delay)
    bus = cast("Bus", systemd)
    systemd.table.doubt_everything()
    await systemd.table.settle(bus)
    assert systemd.table.units[NAME].active_state == "inactive"

    systemd._until_start = starts_after
    await systemd.table.read(bus, NAME)
    for _ in range(10):
        systemd.pass_time()
    await systemd.table.settle(bus)

    assert systemd.table.units[NAME].control_group == GROUP
    assert systemd.changes[-1].after == systemd.table.units[NAME]
