"""What a server's processes have of this host's GPUs, as the drivers say.

It is taken from the figures that ``HostFacts`` keeps for a second, so however often it is asked for, drivers are asked
no oftener.
"""

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.host.gpu_devices import Vendor
from magi_agent.host.gpus import Gpu
from magi_agent.host.unified_hierarchy import processes_in
from magi_agent.host_facts import GpuPicture, HostFacts
from magi_agent.servers.llama_server import devices_of
from magi_agent.servers.placement import used_by_default
from magi_agent.systemd.status import UnitStatus

_PATIENCE: Final = 5.0
"""Seconds that whoever asks waits for drivers."""
_ROCM: Final = "ROCm"


@dataclass(frozen=True, slots=True)
class GpuBytes:
    """What some processes have of all GPUs together."""

    total: int | None
    unavailable: str | None = None
    """Why there is no total."""


class GpuUse:
    """Looks by what the host is known to have."""

    def __init__(self, host: HostFacts) -> None:
        self._host = host

    async def of(self, unit: UnitStatus) -> GpuBytes:
        """What a unit that runs has of all GPUs."""
        try:
            async with asyncio.timeout(_PATIENCE):
                picture = await self._host.gpus(Path(unit.argv[0]))
        except TimeoutError:
            return GpuBytes(None, "nobody says in time which GPUs there are")
        pids = await asyncio.to_thread(processes_in, unit.control_group)
        # Where the control group is not seen, the main process is all that is known.
        return gpu_bytes(picture.gpus, _may_use(picture, unit), pids | ({unit.main_pid} if unit.main_pid else set()))


def gpu_bytes(gpus: Iterable[Gpu], may_use: Iterable[Gpu], pids: Collection[int]) -> GpuBytes:
    """What processes have of all GPUs together.

    That is not told where a driver does not say how much one of them has, or who is on a GPU that they may use.
    """
    for gpu in may_use:
        if why := _why_untold(gpu):
            return GpuBytes(None, f"{_shown(gpu)}: {why}")
    # A GPU that two back ends list is one.
    total = 0
    for gpu in {gpu.pci_address: gpu for gpu in gpus if gpu.processes}.values():
        for pid, size in (gpu.processes or {}).items():
            if pid not in pids:
                continue
            if size is None:
                return GpuBytes(None, f"{_shown(gpu)}: its driver does not say how much process {pid} has of it")
            total += size
    return GpuBytes(total)


def _why_untold(gpu: Gpu) -> str | None:
    """Why a process that is not among those of a GPU may be on it all the same."""
    if gpu.processes is None:
        return gpu.unavailable.get("processes", "its driver tells of no processes")
    if gpu.vendor is Vendor.AMD and gpu.backend != _ROCM:
        return "AMD's driver tells only of processes that compute by ROCm"
    return None


def _shown(gpu: Gpu) -> str:
    return gpu.device or gpu.pci_address or "a GPU"


def _may_use(picture: GpuPicture, unit: UnitStatus) -> Iterable[Gpu]:
    """The GPUs that a unit was started to use, any where its llama-server does not say which it has."""
    if picture.problem:
        return picture.gpus
    named = devices_of(unit.argv)
    return used_by_default(picture.gpus) if named is None else [gpu for gpu in picture.gpus if gpu.device in named]
