"""systemd's manager: start and stop units, and know how they are.

``SystemdManager`` owns one supervising task. It connects, subscribes, reads every unit of its pattern, then follows
signals; once in a while it compares. Whatever makes the picture doubtful (the bus gone, systemd executed anew) ends
the session: pending work fails with a typed error, and a new session starts over and reads everything again.
"""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from magi_agent.systemd.bus import DBUS_NAME, DBUS_PATH, Bus, Signal
from magi_agent.systemd.errors import BusCallFailed, BusDisconnected, BusError, BusTimeout, JobTimeout
from magi_agent.systemd.jobs import JobResult, Jobs
from magi_agent.systemd.properties import properties_of
from magi_agent.systemd.status import Accounting, UnitChange, UnitStatus, figure
from magi_agent.systemd.transient import TransientService
from magi_agent.systemd.unit_table import MANAGER, MANAGER_PATH, PROPERTIES, SERVICE, SLICE, SYSTEMD, UnitTable
from magi_agent.vocabulary import Scope

FIRST_RETRY: Final = 0.1
LAST_RETRY: Final = 5.0
CHECK_INTERVAL: Final = 60.0
_KERNEL_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_UNITS_CHANGED: Final = (
    f"type='signal',sender='{SYSTEMD}',interface='{PROPERTIES}',member='PropertiesChanged',"
    f"path_namespace='{MANAGER_PATH}/unit'"
)
_SYSTEMD_ITSELF: Final = (
    f"type='signal',sender='{DBUS_NAME}',interface='{DBUS_NAME}',path='{DBUS_PATH}',"
    f"member='NameOwnerChanged',arg0='{SYSTEMD}'"
)
_MATCHES: Final = (
    _SYSTEMD_ITSELF,
    _UNITS_CHANGED,
    *(
        f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',path='{MANAGER_PATH}',member='{member}'"
        for member in ("UnitNew", "UnitRemoved", "JobRemoved", "Reloading")
    ),
)

log = logging.getLogger(__name__)


class SystemdManager:
    """A client of one systemd manager that heals itself.

    All callbacks run in the event loop and must be quick:

    * ``on_change``: a unit of the pattern changed, appeared or was unloaded.
    * ``on_connection``: the picture became whole (``True``) or doubtful (``False``); while it is doubtful, ``units``
      holds what was known last.
    * ``on_crash``: the supervising task met an error it did not foresee. It goes on, with a new session.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        pattern: str = "magi-llama-*.service",
        address: str | None = None,
        check_interval: float = CHECK_INTERVAL,
        on_change: Callable[[UnitChange], None] | None = None,
        on_connection: Callable[[bool], None] | None = None,
        on_crash: Callable[[Exception], None] | None = None,
    ) -> None:
        self.scope = scope
        self._address = address
        self._check_interval = check_interval
        self._on_connection = on_connection
        self._on_crash = on_crash
        self._table = UnitTable(pattern, on_change or (lambda _: None))
        self._jobs = Jobs()
        self._bus: Bus | None = None
        self._owner = ""
        self._version = 0
        self._connected = asyncio.Event()
        self._lost_at = -math.inf
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def units(self) -> Mapping[str, UnitStatus]:
        """Every unit of the pattern that systemd has loaded, as far as is known now."""
        return MappingProxyType(self._table.units)

    @property
    def connected(self) -> bool:
        """Whether ``units`` is whole and followed."""
        return self._connected.is_set()

    @property
    def lost_for(self) -> float:
        """Seconds since a connection that was there ended; infinite where there never was one, 0 while there is one."""
        return 0.0 if self.connected else asyncio.get_running_loop().time() - self._lost_at

    def start(self) -> None:
        """Start the supervising task. It connects in the background, and tries for ever."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(), name="systemd-supervisor")

    async def close(self) -> None:
        """End the supervising task and the connection. No unit is touched."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def wait_connected(self, limit: float) -> None:
        """Wait until ``units`` is whole; ``BusTimeout`` after ``limit`` seconds."""
        try:
            async with asyncio.timeout(limit):
                await self._connected.wait()
        except TimeoutError as error:
            raise BusTimeout(f"no connection to systemd within {limit:g} s") from error

    def version(self) -> int:
        """Return systemd's major version; ``BusDisconnected`` before the first connection."""
        if not self._version:
            raise BusDisconnected("systemd has not been reached yet")
        return self._version

    def get(self, name: str) -> UnitStatus | None:
        """Return the unit as known now, ``None`` if systemd has none of this name loaded."""
        return self._table.units.get(name)

    async def refresh(self, name: str) -> UnitStatus | None:
        """Read the unit again and return it, ``None`` if systemd has none of this name. Raises ``BusError``."""
        return await self._table.read(self._session(), name)

    async def start_transient(self, unit: TransientService, *, limit: float) -> JobResult:
        """Create and start a unit, and return how its start job ended.

        With ``Type=exec`` the job is done once the program has been executed. ``get`` shows the outcome afterwards.

        Raises ``UnitExists`` (a unit of the name is loaded, running or failed), ``JobTimeout`` after ``limit``
        seconds, ``ValueError`` for a unit that systemd could not carry faithfully, and other ``BusError``.
        """
        properties = [
            (item.name, (item.signature, item.value))
            for item in properties_of(unit, scope=self.scope, systemd_version=self.version())
        ]
        return await self._job("StartTransientUnit", "ssa(sv)a(sa(sv))", unit.name, "fail", properties, [], limit=limit)

    async def stop(self, name: str, *, limit: float) -> JobResult:
        """Stop a unit and return how the stop job ended; ``DONE`` says only that it is not active any more.

        Raises ``NoSuchUnit``, ``JobTimeout`` after ``limit`` seconds, and other ``BusError``.
        """
        return await self._job("StopUnit", "ss", name, "replace", limit=limit)

    async def reset_failed(self, name: str) -> None:
        """Forget that the unit failed, which frees its name. Raises ``NoSuchUnit`` and other ``BusError``."""
        bus = self._session()
        await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "ResetFailedUnit", "s", name)
        await self._table.read(bus, name)

    async def read_accounting(self, name: str) -> Accounting:
        """Ask what the unit's processes use now. Raises ``NoSuchUnit`` and other ``BusError``."""
        bus = self._session()
        # A unit that is not loaded would be loaded by the question for its properties.
        reply = await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "GetUnit", "s", name)
        path = str(reply[0])
        return Accounting(
            memory_current=await self._figure(bus, path, "MemoryCurrent"),
            memory_peak=await self._figure(bus, path, "MemoryPeak"),
            cpu_usage_nsec=await self._figure(bus, path, "CPUUsageNSec"),
            tasks_current=await self._figure(bus, path, "TasksCurrent"),
        )

    async def control_group(self) -> str:
        """Return the control group that all units of this manager are below. Raises ``BusError``."""
        return str(await self._manager_property("ControlGroup"))

    async def version_text(self) -> str:
        """Return systemd's version in its own words. Raises ``BusError``."""
        return str(await self._manager_property("Version"))

    async def memory_limits(self, slice_name: str) -> tuple[int | None, int | None]:
        """Return ``MemoryHigh=`` and ``MemoryMax=`` of a slice in bytes, also of one that nothing is in.

        ``None`` is no limit. Raises ``BusError``.
        """
        bus = self._session()
        reply = await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "LoadUnit", "s", slice_name)
        path = str(reply[0])
        high = await self._figure(bus, path, "MemoryHigh", SLICE)
        return high, await self._figure(bus, path, "MemoryMax", SLICE)

    async def memory_limits_of_service(self, name: str) -> tuple[int | None, int | None]:
        """Return ``MemoryHigh=`` and ``MemoryMax=`` of a service in bytes, as they are in force.

        ``None`` is no limit. Raises ``NoSuchUnit`` and other ``BusError``.
        """
        bus = self._session()
        path = str((await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "GetUnit", "s", name))[0])
        return await self._figure(bus, path, "MemoryHigh"), await self._figure(bus, path, "MemoryMax")

    async def is_stopping(self) -> bool:
        """Whether the manager, and with it the host or the user's session, is going down. Raises ``BusError``."""
        # Asked for each time: no signal says that it changed.
        return await self._manager_property("SystemState") == "stopping"

    async def boot_id(self) -> str:
        """Return what names this life of the manager: other units than its own are gone. Raises ``BusError``.

        It stays the same over a reload and a re-execution of systemd. The kernel's boot id alone would not do: a user's
        manager, or that of a container, may start many times in one boot.
        """
        started = await self._manager_property("UserspaceTimestampMonotonic")
        return f"{_KERNEL_BOOT_ID.read_text().strip()}-{started}"

    async def _manager_property(self, name: str) -> object:
        reply = await self._session().call(SYSTEMD, MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, name)
        return reply[0]

    async def _figure(self, bus: Bus, path: str, name: str, interface: str = SERVICE) -> int | None:
        try:
            reply = await bus.call(SYSTEMD, path, PROPERTIES, "Get", "ss", interface, name)
        except BusCallFailed:
            # An older systemd does not know the property.
            return None
        return figure(reply[0])

    async def _job(self, member: str, signature: str, *arguments: object, limit: float) -> JobResult:
        """Call a method that answers with a job, and wait for the job. Its first argument is the unit's name."""
        bus = self._session()
        name = str(arguments[0])
        path = ""
        try:
            async with asyncio.timeout(limit):
                reply = await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, member, signature, *arguments, limit=limit)
                path = str(reply[0])
                result = await self._jobs.expect(path)
        except TimeoutError as error:
            raise JobTimeout(f"{name}: {member} did not end within {limit:g} s") from error
        finally:
            self._jobs.forget(path)
        # Signals about the unit come before the one about its job; only what they left open needs reading.
        await self._table.read_marked(bus, name)
        return result

    def _session(self) -> Bus:
        if self._bus is None or not self._connected.is_set():
            raise BusDisconnected("there is no connection to systemd")
        return self._bus

    async def _supervise(self) -> None:
        delay = FIRST_RETRY
        while True:
            try:
                await self._one_session()
            except BusError as error:
                log.warning("systemd cannot be followed: %s", error)
            except Exception as error:
                # The top of the task: what nobody foresaw is reported, and everything is read anew.
                log.exception("following systemd failed")
                if self._on_crash is not None:
                    self._on_crash(error)
            finally:
                was_connected = self._detach()
            delay = FIRST_RETRY if was_connected else min(delay * 2, LAST_RETRY)
            await asyncio.sleep(delay)

    async def _one_session(self) -> None:
        """Connect and follow; ends with a ``BusError``, or with what a handler of ours raised."""
        bus = self._bus = await Bus.connect(self.scope, address=self._address)
        bus.on_signal(self._take)
        bus.on_end(self._table.wake.set)
        try:
            await self._attach(bus)
            while True:
                # Before the wait too: the end may have come with the last answer, and its wake-up is cleared by then.
                bus.raise_if_ended()
                await self._wait_for_work()
                bus.raise_if_ended()
                await self._table.settle(bus)
        except BusError:
            bus.raise_if_ended()
            raise

    async def _attach(self, bus: Bus) -> None:
        for rule in _MATCHES:
            await bus.add_match(rule)
        self._owner = str((await bus.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "GetNameOwner", "s", SYSTEMD))[0])
        await bus.call(SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe")
        version = await bus.call(SYSTEMD, MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, "Version")
        self._version = major_version(str(version[0]))
        self._table.doubt_everything()
        await self._table.settle(bus)
        self._set_connected(True)

    async def _wait_for_work(self) -> None:
        """Return when a unit is marked, when the connection ended, or when it is time to compare."""
        try:
            async with asyncio.timeout(self._check_interval):
                await self._table.wake.wait()
        except TimeoutError:
            self._table.check()

    def _take(self, signal: Signal) -> None:
        if signal.sender == DBUS_NAME:
            if signal.member == "NameOwnerChanged" and signal.body[0] == SYSTEMD and signal.body[2] != self._owner:
                # systemd left, or is another process image now: our subscription is gone with the old one.
                self._end_session()
            return
        # Anyone on the bus may send us a signal that looks like systemd's.
        if signal.sender != self._owner:
            return
        if signal.member == "JobRemoved":
            self._jobs.removed(str(signal.body[1]), str(signal.body[3]))
        else:
            self._table.take(signal)

    def _end_session(self) -> None:
        if self._bus is not None and self._owner:
            self._bus.close()

    def _detach(self) -> bool:
        """Let go of the session, and return whether it had got as far as being connected."""
        was_connected = self._connected.is_set()
        bus, self._bus, self._owner = self._bus, None, ""
        if bus is not None:
            bus.close()
        self._set_connected(False)
        self._jobs.fail_all(lambda: BusDisconnected("the connection to systemd ended before the job did"))
        return was_connected

    def _set_connected(self, connected: bool) -> None:
        if connected == self._connected.is_set():
            return
        if connected:
            self._connected.set()
        else:
            self._connected.clear()
            self._lost_at = asyncio.get_running_loop().time()
        if self._on_connection is not None:
            self._on_connection(connected)


def major_version(text: str) -> int:
    """Return the major version in systemd's own version text (``252.39-1~deb12u1``, ``v257-rc1``); 0 if none."""
    found = re.search(r"\d+", text)
    return int(found.group()) if found else 0
