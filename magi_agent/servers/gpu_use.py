"""What a server's processes have of this host's GPUs, as the drivers say.

It is taken from the figures that ``HostFacts`` keeps for a second, so however often it is asked for, drivers are asked
no oftener.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from magi_agent.host.gpu_devices import Vendor
from magi_agent.host.gpus import Gpu
from magi_agent.host.unified_hierarchy import processes_in
from magi_agent.host_facts import GpuPicture, HostFacts
from magi_agent.servers.llama_server import devices_of
from magi_agent.servers.placement import used_by_default
from magi_agent.systemd.status import UnitStatus

_LOG: Final = logging.getLogger(__name__)
_PATIENCE: Final = 5.0
"""Seconds that whoever asks waits for drivers."""
_ROCM: Final = "ROCm"


class GpuUse:
    """Looks by what the host is known to have."""

    def __init__(self, host: HostFacts) -> None:
        self._host = host

    async def of(self, unit: UnitStatus) -> int | None:
        """Bytes that a unit that runs has of all GPUs; ``None`` where they are not all told."""
        try:
            async with asyncio.timeout(_PATIENCE):
                picture = await self._host.gpus(Path(unit.argv[0]))
        except TimeoutError:
            _LOG.warning("%s: nobody says in time what it has of GPUs", unit.name)
            return None
        pids = await asyncio.to_thread(processes_in, unit.control_group)
        # Where the control group is not seen, the main process is all that is known.
        return gpu_bytes(picture.gpus, _may_use(picture, unit), pids | ({unit.main_pid} if unit.main_pid else set()))


def gpu_bytes(gpus: Iterable[Gpu], may_use: Iterable[Gpu], pids: Collection[int]) -> int | None:
    """Bytes that processes have of all GPUs together.

    ``None`` where a driver does not say how much one of them has, or which processes are on a GPU that they may use.
    """
    if not all(_tells_of_all(gpu) for gpu in may_use):
        return None
    # A GPU that two back ends list is one.
    told = {gpu.pci_address: gpu.processes for gpu in gpus if gpu.processes is not None}
    used = [size for processes in told.values() for pid, size in processes.items() if pid in pids]
    known = [size for size in used if size is not None]
    return sum(known) if len(known) == len(used) else None


def _tells_of_all(gpu: Gpu) -> bool:
    """Whether what is not among a GPU's processes is not on it."""
    return gpu.processes is not None and (gpu.vendor is not Vendor.AMD or gpu.backend == _ROCM)


def _may_use(picture: GpuPicture, unit: UnitStatus) -> Iterable[Gpu]:
    """The GPUs that a unit was started to use, any where its llama-server does not say which it has."""
    if picture.problem:
        return picture.gpus
    named = devices_of(unit.argv)
    return used_by_default(picture.gpus) if named is None else [gpu for gpu in picture.gpus if gpu.device in named]
