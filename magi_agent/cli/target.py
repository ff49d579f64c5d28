"""The model that ``magictl check`` tries choices on, and how each of its choices is put back."""

from collections.abc import Mapping
from dataclasses import dataclass

from magi_agent.cli.answers import text
from magi_agent.cli.client import segment
from magi_agent.cli.phrasing import number
from magi_agent.cli.undo import Step


@dataclass(frozen=True, slots=True)
class Target:
    """A model with the choices that people have made for it."""

    model_id: str
    effective_tier: str
    tier_override: str | None
    thinking_override: bool | None
    enabled: bool
    can_be_enabled_for_a_moment: bool
    """Whether enabling it changes no more than that: it is whole, and has its port already, which it would keep."""

    @property
    def choices(self) -> Mapping[str, object]:
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
        return self._step("tier", self.tier_override)

    def thinking_step(self) -> Step:
        """Return the request that puts the thinking override back."""
        return self._step("thinking", self.thinking_override)

    def enabled_step(self) -> Step:
        """Return the request that puts the choice ``enabled`` back."""
        return self._step("enabled", self.enabled)

    def _step(self, choice: str, value: str | bool | None) -> Step:
        return Step(f"{choice} of {self.model_id}", "PUT", f"/api/models{self.path(choice)}", {choice: value})


def choose(models: Mapping[str, Mapping[str, object]]) -> Target:
    """Return the model that suffers least: not in use, whole, small. ``models`` must not be empty."""

    def cost(model_id: str) -> tuple[bool, bool, bool, float, str]:
        model = models[model_id]
        unusable = text(model.get("status")) not in {"", "ok"}
        size = number(model.get("sizeBytes")) or 0.0
        return model.get("enabled") is True, unusable, model.get("port") is None, size, model_id

    model_id = min(models, key=cost)
    model = models[model_id]
    thinking = model.get("thinkingOverride")
    return Target(
        model_id=model_id,
        effective_tier=text(model.get("effectiveTier")),
        tier_override=text(model.get("tierOverride")) or None,
        thinking_override=thinking if isinstance(thinking, bool) else None,
        enabled=model.get("enabled") is True,
        can_be_enabled_for_a_moment=(
            model.get("enabled") is False and model.get("port") is not None and text(model.get("status")) == "ok"
        ),
    )
