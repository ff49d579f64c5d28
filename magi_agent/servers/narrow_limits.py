"""Limits of memory that a person has set below what the server needs: they hold as they were set, and are told of.

Below its anonymous memory, a server is killed (``MemoryMax=``), or slowed down until it hardly moves (``MemoryHigh=``).
Below that and its mapped weights together, it reads the weights again and again. A derived limit is neither.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.memory.need import MemoryNeed, NeedUnknown
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.memory_limits import MemoryLimits, chosen_limits
from magi_agent.servers.memory_needs import MemoryNeeds
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.shortage import size

_LOG: Final = logging.getLogger(__name__)
_PATIENCE: Final = 10.0
"""Seconds that files and drivers have to tell what servers need; what is not known then is not told of."""


def warnings_of(need: MemoryNeed, limits: MemoryLimits, unit: str | None = None) -> tuple[str, ...]:
    """What limits that somebody set are too narrow for, in sentences.

    ``unit`` is whose they are where they were set there, and not by the model's settings.
    """
    names = (f"MemoryMax of {unit}", f"MemoryHigh of {unit}") if unit else ("memory_max", "memory_high")
    return tuple(_warnings(need, zip(names, (limits.max, limits.high), (True, False), strict=True)))


def _warnings(need: MemoryNeed, limits: Iterable[tuple[str, int | None, bool]]) -> Iterator[str]:
    own, weights = need.anonymous_bytes, need.mapped
    for name, limit, is_hard in limits:
        if limit is None or limit >= own + weights:
            continue
        if limit >= own:
            comes = "its weights do not all stay in memory, and are read from the disk again and again"
        elif is_hard:
            comes = "it is killed as soon as it has taken so much (oom-kill)"
        else:
            comes = "it is slowed down, until it hardly moves, as soon as it has taken so much"
        yield (
            f"{name} is {size(limit)}, and the server needs {size(own + weights)} of memory ({size(own)} of its own "
            f"and {size(weights)} of weights mapped from files, {need.basis}): {comes}; raise {name}, or give it less "
            "to hold (ctx_size)"
        )


class NarrowLimits:
    """Looks at the limits that the settings of models have."""

    def __init__(
        self, registry: Registry, preparation: StartPreparation, needs: MemoryNeeds, effective: EffectiveSettings
    ) -> None:
        self._registry = registry
        self._preparation = preparation
        self._needs = needs
        self._effective = effective

    async def of(self, model: Model) -> tuple[str, ...]:
        """What the limits in a model's settings are too narrow for; nothing where nobody knows what it needs."""
        return (await self.of_each((model.model_id,), self._effective)).get(model.model_id, ())

    async def of_each(self, model_ids: Iterable[str], effective: EffectiveSettings) -> dict[str, tuple[str, ...]]:
        """The same of several, where something is to be told, if these settings held."""
        found: dict[str, tuple[str, ...]] = {}
        try:
            async with asyncio.timeout(_PATIENCE):
                for model_id in model_ids:
                    model = self._registry.models.get(model_id)
                    if model is not None and (warnings := await self._of(model, effective)):
                        found[model_id] = warnings
        except TimeoutError:
            _LOG.warning("whether limits of memory are too narrow is not known: nobody told within %.0f s", _PATIENCE)
        return found

    async def _of(self, model: Model, effective: EffectiveSettings) -> tuple[str, ...]:
        if chosen_limits(effective.of(model)) == MemoryLimits():
            return ()
        await self._preparation.look_at_binaries()
        launch = self._preparation.launch_of(model, model.choices.port or 0, effective)
        try:
            return warnings_of(await self._needs.need_of(launch), chosen_limits(launch.runtime_settings))
        except (NeedUnknown, MagiError):
            return ()
