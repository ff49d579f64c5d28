"""The model that ``magictl check`` tries choices on, and how each of its choices is put back."""

from collections.abc import Mapping
from dataclasses import dataclass

from magi_agent.cli.answers import models_of, text
from magi_agent.cli.client import Client, segment
from magi_agent.cli.phrasing import number
from magi_agent.cli.undo import Step
from magi_agent.vocabulary import ModelStatus


@dataclass(frozen=True, slots=True)
class Target:
    """A model with the choices that people have made for it."""

    model_id: str
    effective_tier: str
    tier_override: str | None
    thinking_override: bool | None
    enabled: bool
    usable: bool
    can_be_enabled_for_a_moment: bool
    """Whether enabling it changes no more than that: it is whole, and has its port already, which it would keep."""

    @property
    def choices(self) -> Mapping[str, str | bool | None]:
        """What the registry must show when all is put back."""
        return {
            "tierOverride": self.tier_override,
            "thinkingOverride": self.thinking_override,
            "enabled": self.enabled,
        }

    def path(self, choice: str) -> str:
        """Return the path of one choice, below ``/api/models``."""
        return f"/{segment(self.model_id)}/{choice}"

    def tier_step(self) -> Step:
        """Return the request that puts the tier override back."""
        return self._step("tier", "tierOverride")

    def thinking_step(self) -> Step:
        """Return the request that puts the thinking override back."""
        return self._step("thinking", "thinkingOverride")

    def enabled_step(self) -> Step:
        """Return the request that puts the choice ``enabled`` back."""
        return self._step("enabled", "enabled")

    def _step(self, choice: str, key: str) -> Step:
        value = self.choices[key]

        def is_as_it_was(client: Client) -> bool:
            models = dict(models_of(client.get("/api/models/registry", "models")))
            return self.model_id in models and models[self.model_id].get(key) == value

        return Step(
            f"{choice} of {self.model_id}", "PUT", f"/api/models{self.path(choice)}", {choice: value}, is_as_it_was
        )


def choose(models: Mapping[str, Mapping[str, object]]) -> Target:
    """Return the model that suffers least: not in use, whole, small. ``models`` must not be empty."""

    def cost(model_id: str) -> tuple[bool, bool, bool, float, str]:
        model = models[model_id]
        size = number(model.get("sizeBytes")) or 0.0
        return model.get("enabled") is True, not _is_whole(model), model.get("port") is None, size, model_id

    model_id = min(models, key=cost)
    model = models[model_id]
    thinking = model.get("thinkingOverride")
    return Target(
        model_id=model_id,
        effective_tier=text(model.get("effectiveTier")),
        tier_override=text(model.get("tierOverride")) or None,
        thinking_override=thinking if isinstance(thinking, bool) else None,
        enabled=model.get("enabled") is True,
        usable=_is_whole(model),
        can_be_enabled_for_a_moment=(
            model.get("enabled") is False and model.get("port") is not None and _is_whole(model)
        ),
    )


def _is_whole(model: Mapping[str, object]) -> bool:
    return text(model.get("status")) == ModelStatus.OK
