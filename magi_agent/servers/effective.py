"""The runtime settings that hold for a model: what was said in the most particular place.

::

    active profile ──over── model's own ──over── its tier's defaults ──over── the host's defaults
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from magi_agent.registry.model import Model
from magi_agent.runtime_settings.defaults import NOTHING_SAID, RuntimeDefaults
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import StartPolicy


class Source(StrEnum):
    """Where a setting that holds was said."""

    PROFILE = "profile"
    MODEL = "model"
    TIER = "tier"
    HOST = "host"


class EffectiveSettings:
    """Joins the layers of settings for one model at a time."""

    def __init__(self, defaults: RuntimeDefaults) -> None:
        self._defaults = defaults
        self._profile: Mapping[str, RuntimeSettings] = MappingProxyType({})
        self.revision = 0
        """Grows with every change of the profile's settings or the defaults."""

    def hold_profile(self, settings: Mapping[str, RuntimeSettings]) -> None:
        """Take the active profile's settings, by model id."""
        self._profile = MappingProxyType(dict(settings))
        self.revision += 1

    def with_profile(self, settings: Mapping[str, RuntimeSettings]) -> "EffectiveSettings":
        """What would hold if these were the active profile's settings."""
        other = EffectiveSettings(self._defaults)
        other.hold_profile(settings)
        return other

    def hold_defaults(self, defaults: RuntimeDefaults) -> None:
        """Take other defaults."""
        self._defaults = defaults
        self.revision += 1

    def of(self, model: Model) -> RuntimeSettings:
        """All that was said for ``model``, joined."""
        joined = RuntimeSettings()
        for _, settings in self._layers(model):
            joined = joined.over(settings)
        return joined

    def sources(self, model: Model) -> dict[str, Source]:
        """Where each setting that holds for ``model`` was said."""
        sources: dict[str, Source] = {}
        for source, settings in reversed(self._layers(model)):
            sources |= {name: source for name, _ in settings.said()}
        return sources

    def start_policy(self, model: Model) -> StartPolicy:
        """When ``model`` is started."""
        for _, settings in self._layers(model):
            if settings.start_policy is not None:
                return settings.start_policy
        return StartPolicy.ALWAYS_ON

    def mode(self, model: Model) -> str | None:
        """What ``model``'s server is for, where somebody said so."""
        for _, settings in self._layers(model):
            if settings.mode is not None:
                return settings.mode
        return None

    def max_concurrent(self, model: Model) -> int | None:
        """Requests that ``model`` may be given at once; ``None`` for any number."""
        for _, settings in self._layers(model):
            if settings.max_concurrent is not None:
                return settings.max_concurrent
        return None

    def _layers(self, model: Model) -> list[tuple[Source, RuntimeSettings]]:
        """The layers, the most particular first."""
        return [
            (Source.PROFILE, self._profile.get(model.model_id, NOTHING_SAID)),
            (Source.MODEL, model.choices.runtime_settings),
            (Source.TIER, self._defaults.of_tier(model.effective_tier)),
            (Source.HOST, self._defaults.host),
        ]
