"""Launches with the memory limits that follow from what the model needs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Final, Protocol

import psutil

from magi_agent.memory.need import MemoryNeed, NeedUnknown
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.memory_limits import MemoryLimits, derived_limits, limits_with_set, may_share_host_memory
from magi_agent.settings import Settings
from magi_agent.vocabulary import LimitSource

_LOG: Final = logging.getLogger(__name__)
_PATIENCE: Final = 30.0
"""Seconds that a start waits for what the model needs."""

NeedOf = Callable[[LaunchSpecification], Awaitable[MemoryNeed]]


class Preparation(Protocol):
    """What launches come from."""

    def knows(self, model_id: str) -> bool:
        """Whether there is such a model now."""

    async def launch_for(self, model_id: str) -> LaunchSpecification:
        """How a model is to be started now. Raises ``MagiError`` where it cannot be."""


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


class LimitedPreparation:
    """Prepares starts as another does, and adds the limits."""

    def __init__(self, preparation: Preparation, need_of: NeedOf, settings: Settings) -> None:
        self._preparation = preparation
        self._need_of = need_of
        self._settings = settings

    def reconfigure(self, settings: Settings) -> None:
        """Take another configuration, for what is started from now on."""
        self._settings = settings

    def knows(self, model_id: str) -> bool:
        """Whether there is such a model now."""
        return self._preparation.knows(model_id)

    async def launch_for(self, model_id: str) -> LaunchSpecification:
        """How a model is to be started now. Raises ``MagiError`` where it cannot be."""
        return await self.limited(await self._preparation.launch_for(model_id))

    async def limited(self, launch: LaunchSpecification) -> LaunchSpecification:
        """The launch with its limits. A need that cannot be told, or not in time, is no reason not to start it."""
        need = None
        if self._settings.memory_limits is LimitSource.DERIVED:
            try:
                async with asyncio.timeout(_PATIENCE):
                    need = await self._need_of(launch)
            except (NeedUnknown, TimeoutError) as error:
                _LOG.warning(
                    "no limit of memory follows from what %s needs, which is not known: %s",
                    launch.model_id, str(error) or f"not within {_PATIENCE:.0f} seconds",
                )  # fmt: skip
        return with_limits(launch, need, self._settings)
