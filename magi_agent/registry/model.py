"""A model as the registry knows it: the facts of its files joined with the choices people made for it."""

from dataclasses import dataclass, field, replace

from magi_agent.discovery.facts import ModelFacts
from magi_agent.registry.content import Content, content_of
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier


@dataclass(frozen=True, slots=True)
class Choices:
    """What people decided for one model; discovery never touches it."""

    tier_override: Tier | None = None
    thinking_override: bool | None = None
    enabled: bool = False
    port: int | None = None
    runtime_settings: RuntimeSettings = field(default_factory=RuntimeSettings)


@dataclass(frozen=True, slots=True)
class Model:
    """One model. ``model_id`` stays with it for ever, wherever its files move."""

    model_id: str
    facts: ModelFacts
    choices: Choices = field(default_factory=Choices)
    present: bool = True
    """Whether it is listed. One that went is remembered, with its id and choices, in case it comes back."""
    former_id: str | None = None
    """The id it had in a registry of an earlier MAGI, by which profiles may still call it."""
    last_whole: Content | None = None
    """What its files held when they were last whole, while they are not."""
    copy_number: int = 0
    """Of models with equal content that nobody has chosen anything for: which copy it came as; 0 of any other."""

    @property
    def content(self) -> Content | None:
        """What its files hold, or held when they were last whole; ``None`` where they never were."""
        return self.last_whole or content_of(self.facts)

    def choosing(self, choices: Choices) -> "Model":
        """The model with these choices: no copy any more of which nobody has made anything."""
        return replace(self, choices=choices, copy_number=0)

    @property
    def effective_tier(self) -> Tier:
        """The person's tier, else discovery's."""
        return self.choices.tier_override or self.facts.assigned_tier

    @property
    def is_thinking_model(self) -> bool:
        """Whether discovery found that it can think."""
        return self.facts.thinking_mode is not ThinkingMode.NONE

    @property
    def effective_thinking(self) -> bool:
        """The person's word on thinking, else discovery's."""
        override = self.choices.thinking_override
        return self.is_thinking_model if override is None else override

    @property
    def is_usable(self) -> bool:
        """Whether its files are whole."""
        return self.facts.status is ModelStatus.OK
