"""What holds where nobody chose: the host's runtime settings, and those of a tier."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import Tier

NOTHING_SAID: Final = RuntimeSettings()
"""One for all: requests ask what holds for every model, and each takes a while to make."""
_NONE: Final[Mapping[Tier, RuntimeSettings]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RuntimeDefaults:
    """The defaults of ``agent.toml``; a tier's go before the host's."""

    host: RuntimeSettings = field(default_factory=RuntimeSettings)
    tiers: Mapping[Tier, RuntimeSettings] = field(default_factory=lambda: _NONE)

    def of_tier(self, tier: Tier) -> RuntimeSettings:
        """What a tier's models get beyond the host's."""
        return self.tiers.get(tier, NOTHING_SAID)
