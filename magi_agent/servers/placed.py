"""A launch with its place: where its memory is to come from."""

from collections.abc import Mapping
from dataclasses import dataclass

from magi_agent.memory.need import MemoryNeed
from magi_agent.servers.launch import LaunchSpecification


@dataclass(frozen=True, slots=True)
class GpuShortage:
    """That no place was found on GPUs; sizes are bytes."""

    needed: int
    free: int
    promised: int
    """Of what is free, what other servers were promised and do not use yet."""
    devices: tuple[str, ...]
    """Where it was looked, by llama-server's names."""


@dataclass(frozen=True, slots=True)
class Placed:
    """How a server is to be launched, and what it needs there."""

    launch: LaunchSpecification
    need: MemoryNeed | None
    unknown: str | None
    """Why there is no need, in a sentence."""
    gpu_bytes: Mapping[str, int]
    """What it needs of each GPU, by llama-server's names."""
    gpu_shortage: GpuShortage | None
