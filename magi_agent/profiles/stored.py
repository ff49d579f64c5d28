"""Profile files: YAML, nested (``profile: {name, description}`` with the rest beside it) or flat.

A number YAML or JSON cannot carry, the infinite ``max_score`` of the last tier, is ``null`` in the file.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from magi_agent.plain_yaml import AliasInYaml, EmptyYaml, InvalidYaml, read_plain
from magi_agent.profiles.profile import (
    DEFAULT_TIERS,
    LoadBalancing,
    LoadBalancingStrategy,
    Profile,
    TierConfig,
    TwoStage,
)
from magi_agent.runtime_settings.reading import InvalidRuntimeSettings, read_settings, written
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import Tier

MAX_PROFILE_BYTES: Final = 256 * 1024
"""Ten thousand models' names; YAML takes a second for each megabyte."""
_ModelId = Annotated[str, Field(max_length=300)]


class InvalidProfile(ValueError):
    """A file is no profile; ``line`` counts from 1 where it is known."""

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.reason = reason
        self.line = line


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", use_enum_values=False)


class _TierConfig(_Stored):
    name: str = Field(min_length=1, max_length=100)
    max_score: float = Field(math.inf, gt=-math.inf)  # which NaN is not either
    expected_time_seconds: float = Field(5.0, ge=0, le=86_400)
    description: str = Field("", max_length=2_000)

    @field_validator("max_score", mode="before")
    @classmethod
    def _null_is_no_limit(cls, score: object) -> object:
        return math.inf if score is None else score


class _TwoStage(_Stored):
    enabled: bool = False
    stage1_tier: Tier = Tier.BALANCED
    stage2_tier: Tier = Tier.POWERFUL
    stage1_max_tokens: int = Field(500, ge=1, le=1_000_000)


class _LoadBalancing(_Stored):
    enabled: bool = True
    strategy: LoadBalancingStrategy = LoadBalancingStrategy.ROUND_ROBIN
    health_check_interval: float = Field(30.0, gt=0, le=86_400)


class _Profile(_Stored):
    """The limits are those of the wire: what a file holds can be told, and sent again."""

    name: str = Field(min_length=1, max_length=200)
    description: str = Field("", max_length=10_000)
    enabled_models: tuple[_ModelId, ...] = Field((), max_length=10_000)
    tier_config: tuple[_TierConfig, ...] | None = Field(
        None, max_length=100, validation_alias=AliasChoices("tier_config", "tiers")
    )
    two_stage: _TwoStage = Field(default_factory=_TwoStage)
    load_balancing: _LoadBalancing = Field(default_factory=_LoadBalancing)
    runtime_settings: dict[_ModelId, dict[str, Any] | None] = Field(default_factory=dict, max_length=10_000)

    @field_validator("description", "enabled_models", "two_stage", "load_balancing", "runtime_settings", mode="before")
    @classmethod
    def _empty_is_default(cls, value: object, info: Any) -> object:
        # In YAML, a key with nothing after it is null; a person means "nothing here".
        return cls.model_fields[info.field_name].get_default(call_default_factory=True) if value is None else value


def read_profile(data: bytes, slug: str) -> Profile:
    """A profile file's content; ``slug`` is its name where it gives none. Raises ``InvalidProfile``."""
    node, document = _parsed(data)
    if not isinstance(document, dict):
        raise InvalidProfile("a profile is a mapping, with 'profile:' and 'enabled_models:'", 1)
    nested = document.get("profile")
    if not isinstance(nested, dict | None):
        # Taken for an empty profile, it would stop every model when it is activated.
        raise InvalidProfile(
            "profile: a mapping with a name and a description belongs here", _line_of(node, ("profile",))
        )
    flat = {"name": slug, **document, **(nested or {})}
    try:
        stored = _Profile.model_validate(flat)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = tuple(first["loc"])
        line = _line_of(node, place) or _line_of(node, ("profile", *place))
        raise InvalidProfile(f"{'.'.join(map(str, place))}: {first['msg']}", line) from None
    return Profile(
        stored.name,
        stored.description,
        stored.enabled_models,
        DEFAULT_TIERS
        if stored.tier_config is None
        else tuple(
            TierConfig(tier.name, tier.max_score, tier.expected_time_seconds, tier.description)
            for tier in stored.tier_config
        ),
        TwoStage(**stored.two_stage.model_dump()),
        LoadBalancing(**stored.load_balancing.model_dump()),
        {
            model_id: _read_settings(node, model_id, document or {})
            for model_id, document in stored.runtime_settings.items()
        },
    )


def _read_settings(node: yaml.Node, model_id: str, document: dict[str, Any]) -> RuntimeSettings:
    try:
        return read_settings(document)
    except InvalidRuntimeSettings as error:
        first = error.faults[0]
        place = ("runtime_settings", model_id, *first.name.split("."))
        line = _line_of(node, place) or _line_of(node, ("profile", *place))
        raise InvalidProfile(f"{'.'.join(filter(None, place))}: {first.message}", line) from None


def _parsed(data: bytes) -> tuple[yaml.Node, object]:
    """The one YAML document in ``data``, as nodes (which know their lines) and as values."""
    if len(data) > MAX_PROFILE_BYTES:
        raise InvalidProfile(f"the file is larger than {MAX_PROFILE_BYTES} bytes", None)
    try:
        return read_plain(data.decode())
    except UnicodeDecodeError:
        raise InvalidProfile("the file is not UTF-8 text", None) from None
    except EmptyYaml:
        raise InvalidProfile("the file is empty", None) from None
    except AliasInYaml as error:
        raise InvalidProfile("a profile has no use for YAML aliases", error.line) from None
    except InvalidYaml as error:
        first_line = str(error.__cause__).partition("\n")[0]
        raise InvalidProfile(error.reason or f"the file is not YAML: {first_line}", error.line) from None


def write_profile(profile: Profile) -> bytes:
    """The nested form of a profile."""
    document = {
        "profile": {"name": profile.name, "description": profile.description},
        "enabled_models": list(profile.enabled_models),
        "tier_config": [
            {
                "name": tier.name,
                "max_score": tier.max_score if math.isfinite(tier.max_score) else None,
                "expected_time_seconds": tier.expected_time_seconds,
                "description": tier.description,
            }
            for tier in profile.tier_config
        ],
        "two_stage": {
            "enabled": profile.two_stage.enabled,
            "stage1_tier": str(profile.two_stage.stage1_tier),
            "stage2_tier": str(profile.two_stage.stage2_tier),
            "stage1_max_tokens": profile.two_stage.stage1_max_tokens,
        },
        "load_balancing": {
            "enabled": profile.load_balancing.enabled,
            "strategy": str(profile.load_balancing.strategy),
            "health_check_interval": profile.load_balancing.health_check_interval,
        },
        "runtime_settings": {model_id: written(settings) for model_id, settings in profile.runtime_settings.items()},
    }
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode()


class _Dumper(yaml.SafeDumper):
    """The safe dumper, but for texts with Unicode's own line breaks: unquoted, they are read again as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _line_of(node: yaml.Node | None, place: Sequence[object]) -> int | None:
    """The line where the value at ``place`` stands, or the nearest thing around it."""
    line: int | None = None
    for step in place:
        if isinstance(node, yaml.MappingNode):
            found = next((value for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = node.value[step]
        else:
            found = None
        if found is None:
            return line
        node = found
        line = node.start_mark.line + 1
    return line
