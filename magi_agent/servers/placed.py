"""A placed launch: how a server is started on this host's GPUs, and what it will take of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from magi_agent.memory.need import MemoryNeed
from magi_agent.servers.launch import LaunchSpecification


@dataclass(frozen=True, slots=True)
class GpuShortage:
    """Why what the settings ask for does not fit; bytes of the devices together."""

    needed: int
    free: int
    """As the drivers say, what was promised included."""
    promised: int
    """To other servers, which have not taken it yet."""
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A launch with its GPUs chosen."""

    launch: LaunchSpecification
    need: MemoryNeed | None
    """``None`` where it is not known."""
    unknown: str | None
    """Why the need is not known."""
    gpu_bytes: Mapping[str, int]
    """What it will take of each GPU, by the device's name."""
    gpu_shortage: GpuShortage | None
    shared_bytes: int = 0
    """Of ``gpu_bytes``, those of GPUs that have no memory but the host's: they count against that too."""
    overruled: str | None = None
    """Why it does not fit, where somebody has forced it all the same."""


class Placing(Protocol):
    """Chooses GPUs for launches."""

    async def place(self, launch: LaunchSpecification, promised: Mapping[str, int]) -> Placed:
        """Choose; ``promised`` are bytes by device that other starts were promised and have not taken yet.

        Raises ``MagiError`` where the operator's choice of GPUs cannot be followed.
        """
