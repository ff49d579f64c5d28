"""In which order models are started where not all fit at once: the most wanted first."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.registry.registry import Registry
from magi_agent.servers.desired import Desired
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.vocabulary import StartPolicy

_NOWHERE: Final = sys.maxsize


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """How much a model is wanted: what is less comes first, by the fields in their order."""

    is_unpinned: bool
    is_unnamed: bool
    """Whether nobody asked in this boot for this very model."""
    place: int
    """Among the active profile's enabled models."""
    is_for_requests: bool
    """Whether its start policy is another than to be up always."""
    need: int
    """Bytes; before they are known, those of its files. The smaller first, so that most come up."""
    model_id: str


class StartOrder:
    """Ranks models by what is known of them now."""

    def __init__(
        self,
        registry: Registry,
        effective: EffectiveSettings,
        desired: Desired,
        place: Callable[[str], int | None],
    ) -> None:
        """``place`` is where a model stands in the active profile."""
        self._registry = registry
        self._effective = effective
        self._desired = desired
        self._place = place

    def under(self, effective: EffectiveSettings, places: Mapping[str, int]) -> "StartOrder":
        """The order if another profile were active: by its settings, and the places it gives models."""
        return StartOrder(self._registry, effective, self._desired, places.get)

    def rank(self, model_id: str) -> Rank:
        """How much a model is wanted."""
        model, wish, place = self._registry.models.get(model_id), self._desired[model_id], self._place(model_id)
        return Rank(
            is_unpinned=model is None or not self._effective.of(model).pinned,
            is_unnamed=wish is None or not (wish.run and wish.is_named),
            place=_NOWHERE if place is None else place,
            is_for_requests=model is None or self._effective.start_policy(model) is not StartPolicy.ALWAYS_ON,
            need=model.facts.size_bytes if model else _NOWHERE,
            model_id=model_id,
        )

    def ordered(self, model_ids: Iterable[str]) -> tuple[str, ...]:
        """Some models, the most wanted first."""
        return tuple(sorted(model_ids, key=self.rank))
