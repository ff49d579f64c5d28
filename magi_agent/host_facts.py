"""What this host has: processors, memory and its limits, GPUs, the disks of the model folders.

What costs little is looked at when somebody asks, at most once a second. NVIDIA's figures take a probe, since the agent
itself opens no devices: at most one a second too, only where NVIDIA's driver is, and only while somebody asks. The list
of devices is asked for once for each llama-server, again when that is another file, after a reload, and when told to.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Final, Generic, TypeVar

import psutil

from magi_agent.daemon_thread import in_daemon_thread
from magi_agent.errors import MagiError
from magi_agent.host.card_figures import CardFigures, card_figures, rocm_order
from magi_agent.host.disks import Disk, Disks
from magi_agent.host.gpu_devices import Tree, Vendor, cards, nvidia_driver_version
from magi_agent.host.gpus import Drivers, Gpu, gpus_of
from magi_agent.host.memory import HostMemory, SliceLimits, host_memory
from magi_agent.host.nvidia_driver import NvidiaDriver
from magi_agent.host.nvml_figures import NvidiaFigures, read_figures, read_order
from magi_agent.host.processors import Processors, processors
from magi_agent.host.unified_hierarchy import processes_in
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.devices import Answers, BinaryDevices, Devices
from magi_agent.servers.launch import SLICE, model_id_of
from magi_agent.servers.questions import Question
from magi_agent.settings.settings import Settings
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.manager import SystemdManager

_LOG: Final = logging.getLogger(__name__)
_FRESH: Final = 1.0
"""Seconds that figures hold."""
_LIMITS_FRESH: Final = 3.0
"""Seconds that systemd's word on the limits of slices holds."""
_PATIENCE: Final = 10.0
"""Seconds that somebody who asks waits for a driver or a llama-server."""
_HEALTH_PATIENCE: Final = 2.0
"""Likewise, who asks for health."""
_SYSTEMD_PATIENCE: Final = 3.0
"""Likewise, for systemd."""
_PAUSE: Final = 30.0
"""Seconds that a driver is left alone which did not answer."""
_Figure = TypeVar("_Figure")


@dataclass(frozen=True, slots=True)
class GpuPicture:
    """The GPUs as one llama-server sees them, and what the drivers say of them."""

    gpus: tuple[Gpu, ...]
    users: Mapping[str, tuple[str, ...]]
    """The models that use a GPU, by its PCI address; of those whose driver tells."""
    problem: str | None
    """Why llama-server does not say which devices it has."""
    driver_problem: str | None
    """Why nothing, or not everything, is known from NVIDIA's driver."""
    listed_at: datetime | None
    """When it was asked."""


@dataclass(frozen=True, slots=True)
class HostPicture:
    """The whole host at one moment."""

    taken_at: datetime
    hostname: str
    kernel: str
    systemd_version: str | None
    booted_at: datetime
    uptime: float
    """Seconds."""
    processors: Processors
    memory: HostMemory
    gpus: GpuPicture
    disks: tuple[Disk, ...]


class _Kept(Generic[_Figure]):
    """One thing that is asked for at most once at a time, and not again while it is fresh.

    It goes on when who asked has no patience left, and its outcome is for whoever asks next.
    """

    def __init__(self, ask: Callable[[], Awaitable[_Figure]], patience: float = _PATIENCE) -> None:
        """``patience`` is how many seconds somebody who asks waits."""
        self._ask = ask
        self._patience = patience
        self._task: asyncio.Future[_Figure] | None = None
        self._at = 0.0
        self._is_stale = False

    async def get(self, max_age: float) -> _Figure:
        """The thing, not older than ``max_age`` seconds. Raises ``TimeoutError`` where it takes too long."""
        now = asyncio.get_running_loop().time()
        task = self._task
        if task is None or (task.done() and (self._is_stale or now - self._at > max_age or _failed(task))):
            self._at, self._is_stale = now, False
            task = self._task = asyncio.ensure_future(self._ask())
        done, _ = await asyncio.wait({task}, timeout=self._patience)
        if not done or task.cancelled():
            raise TimeoutError
        return task.result()

    def forget(self) -> None:
        """Ask anew the next time, however fresh it is."""
        self._is_stale = True

    async def close(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _failed(task: "asyncio.Future[_Figure]") -> bool:
    return task.cancelled() or task.exception() is not None


class HostFacts:
    """Looks at the host."""

    def __init__(
        self,
        manager: SystemdManager,
        answers: Answers,
        binaries: Binaries,
        settings: Settings,
        tree: Tree | None = None,
    ) -> None:
        """``answers`` runs probes; ``tree`` is where the kernel's file systems are."""
        self._manager = manager
        self._answers = answers
        self._settings = settings
        self._tree = tree or Tree()
        self._devices = Devices(answers, binaries)
        self._driver = NvidiaDriver(self._tree)
        self._disks = Disks()
        self._figures = _Kept(self._ask_for_figures)
        self._order = _Kept(self._ask_for_order)
        self._card_figures = _Kept(lambda: in_daemon_thread(self._look_at_cards, "sysfs of GPUs"))
        self._memory = _Kept(self._look_at_memory)
        self._slice_limits = _Kept(self._slices)
        self._problem = _Kept(lambda: in_daemon_thread(self._driver.problem, "NVIDIA's driver"), _HEALTH_PATIENCE)
        self._logged: str | None = None
        self._listing: dict[Path, asyncio.Task[BinaryDevices]] = {}
        self._silence: dict[Question, tuple[float, str]] = {}
        """Until when a driver is left alone, and why."""

    def reconfigure(self, settings: Settings) -> None:
        """Go by another configuration."""
        self._settings = settings
        self._devices.forget()
        self._order.forget()
        self._silence.clear()

    async def close(self) -> None:
        """Wait for no answer any more."""
        for kept in (
            *(self._figures, self._order, self._card_figures, self._memory, self._problem),
            self._slice_limits,
        ):
            await kept.close()
        for task in self._listing.values():
            task.cancel()
        await asyncio.gather(*self._listing.values(), return_exceptions=True)
        await self._disks.close()

    async def picture(self, binary: Path | None = None, *, refresh: bool = False) -> HostPicture:
        """The host now, with the GPUs as ``binary`` (the llama-server of the configuration) sees them.

        With ``refresh`` the devices are asked for again.
        """
        if refresh:
            self._order.forget()
        # Whoever looks at the host sees the limits of now; they cost too much for each start alone.
        self._slice_limits.forget()
        memory, gpus, disks, version, rest = await asyncio.gather(
            self.memory(),
            self.gpus(binary, max_age=0.0 if refresh else None),
            self._disks.look(self._settings.model_scan_path),
            self._systemd_version(),
            asyncio.to_thread(self._rest),
        )
        booted, computing = rest
        now = time.time()
        return HostPicture(
            taken_at=datetime.fromtimestamp(now, UTC),
            hostname=socket.gethostname(),
            kernel=os.uname().release,
            systemd_version=version,
            booted_at=datetime.fromtimestamp(booted, UTC),
            uptime=max(0.0, now - booted),
            processors=computing,
            memory=memory,
            gpus=gpus,
            disks=disks,
        )

    async def memory(self, *, max_age: float = _FRESH) -> HostMemory:
        """The memory, and the limits above the servers, not older than ``max_age`` seconds."""
        return await self._memory.get(max_age)

    async def gpus(self, binary: Path | None = None, *, max_age: float | None = None) -> GpuPicture:
        """The GPUs as a llama-server sees them, with figures of now where a driver tells them.

        ``max_age`` is how old, in seconds, the llama-server's own list may be; without it, any that is right.
        """
        path = binary or self._settings.llama_server_path
        said = await self._said_of(path, max_age)
        drivers = await self._ask_drivers(needs_order=any(each.backend == "CUDA" for each in said.devices))
        reason = said.problem or f"{path} lists no such device"
        found = gpus_of(said.devices, drivers, reason)
        users = await self._users(found)
        return GpuPicture(found, users, said.problem, drivers.nvidia_problem, said.asked_at)

    async def nvidia_problem(self) -> str | None:
        """Say that NVIDIA's driver and its libraries have different versions, and what mends it.

        What is found new is in the journal too, once.
        """
        try:
            problem = await self._problem.get(_FRESH)
        except TimeoutError:
            return None
        if problem and problem != self._logged:
            _LOG.error("%s", problem)
        self._logged = problem
        return problem

    async def _said_of(self, binary: Path, max_age: float | None) -> BinaryDevices:
        """What a llama-server lists; one that takes long goes on, and whoever asks next may have it."""
        task = self._listing.get(binary)
        if task is None or task.done():
            task = self._listing[binary] = asyncio.create_task(self._devices.of(binary, max_age=max_age))
        done, _ = await asyncio.wait({task}, timeout=_PATIENCE)
        if done and not task.cancelled():
            if self._listing.get(binary) is task:
                del self._listing[binary]
            return task.result()
        problem = f"{binary} has not said within {_PATIENCE:.0f} s which devices it has"
        return BinaryDevices((), problem, datetime.now(UTC))

    async def _ask_drivers(self, *, needs_order: bool) -> Drivers:
        drivers, version = await asyncio.to_thread(self._list_cards)
        try:
            # Most hosts have none, and each start asks.
            if any(card.vendor is not Vendor.NVIDIA for card in drivers.cards):
                drivers = replace(drivers, figures=await self._card_figures.get(_FRESH))
        except TimeoutError:
            _LOG.warning("a GPU's driver has not answered within %.0f s in sysfs", _PATIENCE)
        if version is None:
            if any(card.vendor is Vendor.NVIDIA for card in drivers.cards):
                return replace(drivers, nvidia_problem="NVIDIA's driver is not loaded")
            return drivers
        if problem := await self.nvidia_problem():
            return replace(drivers, nvidia_problem=problem)
        try:
            figures = await self._figures.get(_FRESH)
        except (TimeoutError, MagiError, ValueError) as error:
            reason = str(error) or f"NVIDIA's driver has not answered within {_PATIENCE:.0f} s"
            return replace(drivers, nvidia_problem=reason)
        order = None
        if needs_order and len(figures.gpus) > 1:
            order = await self._known_order()
        return replace(drivers, nvidia=figures, nvidia_problem=figures.problem, cuda_order=order)

    async def _known_order(self) -> tuple[str, ...] | None:
        try:
            return await self._order.get(float("inf"))
        except (TimeoutError, MagiError, ValueError):
            return None

    async def _ask_for_figures(self) -> NvidiaFigures:
        return await self._ask_driver(Question.FIGURES, read_figures)

    async def _ask_for_order(self) -> tuple[str, ...]:
        return await self._ask_driver(Question.ORDER, read_order)

    async def _ask_driver(self, question: Question, read: Callable[[str], _Figure]) -> _Figure:
        """Ask NVIDIA's driver, but one that did not answer not at once again. Raises ``MagiError``, ``ValueError``."""
        until, why = self._silence.get(question, (0.0, ""))
        if asyncio.get_running_loop().time() < until:
            raise ValueError(why)
        try:
            return read(await self._answers.answer_of(question))
        except (MagiError, ValueError) as error:
            why = f"NVIDIA's driver cannot be asked: {error}"
            self._silence[question] = asyncio.get_running_loop().time() + _PAUSE, why
            raise ValueError(why) from None

    def _list_cards(self) -> tuple[Drivers, str | None]:
        """What the kernel itself knows of GPUs, and the version of NVIDIA's driver."""
        drivers = Drivers(cards=cards(self._tree), rocm_order=rocm_order(self._tree.sys))
        return drivers, nvidia_driver_version(self._tree)

    def _look_at_cards(self) -> dict[str, CardFigures]:
        """What only drivers know, which ask the GPU for it: one that hangs may keep them waiting."""
        others = [card for card in cards(self._tree) if card.vendor is not Vendor.NVIDIA]
        return {card.address: card_figures(card, self._tree.sys) for card in others}

    async def _users(self, found: tuple[Gpu, ...]) -> dict[str, tuple[str, ...]]:
        """Which models use each GPU, by the processes in the control groups of their units."""
        told = {gpu.pci_address: gpu.processes for gpu in found if gpu.pci_address and gpu.processes is not None}
        if not any(told.values()):
            return dict.fromkeys(told, ())
        groups = {
            model_id_of(name): unit.control_group for name, unit in self._manager.units.items() if unit.control_group
        }
        models = await asyncio.to_thread(_models_of, groups)
        return {
            address: tuple(sorted({models[pid] for pid in pids if pid in models})) for address, pids in told.items()
        }

    async def _look_at_memory(self) -> HostMemory:
        # A start asks for figures of this moment; limits that somebody changes may come a moment later.
        slices, group = await self._slice_limits.get(_LIMITS_FRESH)
        return await asyncio.to_thread(host_memory, slices, group, self._tree)

    async def _slices(self) -> tuple[list[SliceLimits], str]:
        """The servers' slice and those above it, as systemd has them; nothing where systemd cannot be asked."""
        try:
            async with asyncio.timeout(_SYSTEMD_PATIENCE):
                group = await self._manager.control_group()
                names = slices_above(SLICE)
                found = []
                for depth, name in enumerate(names):
                    path = str(PurePosixPath(group or "/", *reversed(names[depth:])))
                    found.append(SliceLimits(name, path, *await self._manager.memory_limits(name)))
        except (BusError, TimeoutError):
            return [], "/"
        return found, group

    async def _systemd_version(self) -> str | None:
        try:
            async with asyncio.timeout(_SYSTEMD_PATIENCE):
                return await self._manager.version_text()
        except (BusError, TimeoutError):
            return None

    def _rest(self) -> tuple[float, Processors]:
        return psutil.boot_time(), processors(self._tree)


def slices_above(name: str) -> tuple[str, ...]:
    """A slice and those it is in, by their names (systemd.slice(5)): ``a-b.slice`` is in ``a.slice``."""
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    return tuple(f"{'-'.join(parts[:count])}.slice" for count in range(len(parts), 0, -1))


def _models_of(groups: Mapping[str, str]) -> dict[int, str]:
    """The model that each process in some control groups belongs to."""
    return {pid: model_id for model_id, group in groups.items() for pid in processes_in(group)}
