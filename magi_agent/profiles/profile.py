"""A profile: a named set of enabled models with the settings that hold while it is active."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import Tier


class LoadBalancingStrategy(StrEnum):
    """How a request that names a tier finds one of its servers."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class TierConfig:
    """Up to which complexity score a request goes to a tier."""

    name: str
    max_score: float
    """Infinity for the last tier."""
    expected_time_seconds: float
    description: str = ""


@dataclass(frozen=True, slots=True)
class TwoStage:
    """A draft by one tier, refined by another."""

    enabled: bool = False
    stage1_tier: Tier = Tier.BALANCED
    stage2_tier: Tier = Tier.POWERFUL
    stage1_max_tokens: int = 500


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """How the servers of one tier share its requests."""

    enabled: bool = True
    strategy: LoadBalancingStrategy = LoadBalancingStrategy.ROUND_ROBIN
    health_check_interval: float = 30.0
    """Seconds."""


DEFAULT_TIERS: Final = (
    TierConfig("fast", 3.0, 2.0, "short answers from small models"),
    TierConfig("balanced", 7.0, 5.0, "everyday work"),
    TierConfig("powerful", math.inf, 15.0, "the largest models, and those that think"),
)


@dataclass(frozen=True, slots=True)
class Profile:
    """One profile, whatever form its file has."""

    name: str
    description: str = ""
    enabled_models: tuple[str, ...] = ()
    tier_config: tuple[TierConfig, ...] = DEFAULT_TIERS
    two_stage: TwoStage = field(default_factory=TwoStage)
    load_balancing: LoadBalancing = field(default_factory=LoadBalancing)
    runtime_settings: Mapping[str, RuntimeSettings] = field(default_factory=dict)
