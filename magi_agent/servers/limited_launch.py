"""Launches with the memory limits that follow from what the model needs."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import psutil

from magi_agent.memory.need import MemoryNeed
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.memory_limits import MemoryLimits, derived_limits, limits_with_set, may_share_host_memory
from magi_agent.servers.placed import Placed, Placing
from magi_agent.settings.settings import Settings
from magi_agent.vocabulary import LimitSource


def with_limits(
    launch: LaunchSpecification, need: MemoryNeed | None, settings: Settings, devices: Iterable[str] = ()
) -> LaunchSpecification:
    """The launch with the limits that hold for what it needs; ``devices`` are the names of the GPUs it uses.

    Without a need, nothing but what a person set.
    """
    if settings.memory_limits is not LimitSource.DERIVED:
        return replace(launch, memory_limits=None)
    derived = (
        MemoryLimits()
        if need is None
        else derived_limits(
            need,
            settings.memory_headroom,
            host_bytes=psutil.virtual_memory().total,
            shares_host_memory=may_share_host_memory(devices),
        )
    )
    return replace(launch, memory_limits=limits_with_set(derived, launch.runtime_settings))


class LimitedPlacing:
    """Places launches as another does, and adds the limits."""

    def __init__(self, placing: Placing, settings: Settings) -> None:
        self._placing = placing
        self._settings = settings

    def reconfigure(self, settings: Settings) -> None:
        """Take another configuration, for what is placed from now on."""
        self._settings = settings

    async def place(self, launch: LaunchSpecification, promised: Mapping[str, int]) -> Placed:
        """Place a launch; where its need is not known, with no limits but those that a person set.

        Raises what placing does.
        """
        placed = await self._placing.place(launch, promised)
        return replace(placed, launch=with_limits(placed.launch, placed.need, self._settings, placed.gpu_bytes))
