"""The model ``auto``: the request's complexity picks a tier, by the active profile's ``tierConfig``.

The first tier whose ``maxScore`` the score does not exceed is asked. Where no model of it can be had, the next larger
ones are, and then the next smaller ones. A request with images or sound is for those that see or hear, of whatever
tier. Where the profile's ``twoStage`` helps a request, its two tiers are asked.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.gateway.complexity import HIGHEST, Complexity, complexity, question_of
from magi_agent.gateway.model_field import taken_apart
from magi_agent.gateway.model_names import ModelNames, UnknownName
from magi_agent.gateway.senses import NOTHING, Sense
from magi_agent.gateway.tier_models import EmptyTier, NoneOfTier, TierModels
from magi_agent.gateway.tiers import BY_SIZE, Kind, Prospect
from magi_agent.gateway.two_stage import Drafter, takes_draft, takes_two_stages
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profile import DEFAULT_TIERS, TierConfig, TwoStage
from magi_agent.registry.model import Model
from magi_agent.vocabulary import Tier

AUTO: Final = "auto"
"""The name that means any model. One that is called so by its id, an alias or its file wins."""
_LARGE: Final = 64 * 1024
"""Bytes of a body from which on it is read in a thread."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a request."""

    model: Model
    tier: Tier
    score: float
    drafter: Drafter | None = None
    """Who is to make a draft for the model, where one is to be made."""

    def headers(self) -> Mapping[str, str]:
        """What its answer says of the choice."""
        return {"X-Magi-Tier": self.tier.value, "X-Magi-Score": f"{self.score:g}"}


class Automatic:
    """Chooses models for requests that leave it to the agent."""

    def __init__(self, names: ModelNames, tiers: TierModels, active_profile: ActiveProfile) -> None:
        self._names = names
        self._tiers = tiers
        self._active_profile = active_profile

    def is_meant(self, name: str | None) -> bool:
        """Whether a name leaves the choice to the agent."""
        if name != AUTO:
            return False
        try:
            self._names.model(name)
        except UnknownName as error:
            return "modelIds" not in error.details
        return False

    async def choose(self, body: bytes, kind: Kind, needs: frozenset[Sense] = NOTHING, *, is_chat: bool) -> Choice:
        """The model for a request, or the two for a chat; they have the senses that it ``needs``.

        Raises ``EmptyTier``, ``NoneOfTier``, ``UnreadableBody``.
        """
        found, drafts = await asyncio.to_thread(_looked_at, body) if len(body) > _LARGE else _looked_at(body)
        held = self._active_profile.held
        wanted = tier_for(found.score, held.tier_config if held else DEFAULT_TIERS)
        if is_chat and drafts and held and takes_two_stages(held.two_stage, wanted):
            with suppress(EmptyTier, NoneOfTier):
                tier = held.two_stage.stage2_tier
                model = await self._tiers.choose(tier, kind, needs)
                return Choice(model, tier, found.score, await self._drafter(held.two_stage, kind, needs))
        first: MagiError | None = None
        for tier in _order(wanted):
            try:
                return Choice(await self._tiers.choose(tier, kind, needs), tier, found.score)
            except (EmptyTier, NoneOfTier) as error:
                # That there is a model, but none is started, says more than that there is none.
                if first is None or (isinstance(error, NoneOfTier) and isinstance(first, EmptyTier)):
                    first = error
        if isinstance(first, NoneOfTier):
            raise first
        raise EmptyTier.without(kind, needs, name=AUTO)

    def is_available(self, kind: Kind, needs: frozenset[Sense] = NOTHING, *, on_demand: bool) -> bool:
        """Whether ``choose`` would find a model that is ready, or, ``on_demand``, one to start, whatever the score is.

        Who would make a draft does not count: where there is none, the answer comes without.
        """
        held = self._active_profile.held
        prospects = {tier: self._tiers.prospect(tier, kind, needs) for tier in BY_SIZE}
        orders = []
        for wanted in tiers_for(held.tier_config if held else DEFAULT_TIERS):
            orders.append(_order(wanted))
            if held and takes_two_stages(held.two_stage, wanted):
                orders.append((held.two_stage.stage2_tier, *_order(wanted)))
        found = (next((tier for tier in order if prospects[tier] is not Prospect.NONE), None) for order in orders)
        return all(tier is not None and prospects[tier].is_good(on_demand=on_demand) for tier in found)

    async def _drafter(self, two_stage: TwoStage, kind: Kind, needs: frozenset[Sense]) -> Drafter | None:
        """Who makes a draft; ``None`` where nobody can."""
        with suppress(EmptyTier, NoneOfTier):
            model = await self._tiers.choose(two_stage.stage1_tier, kind, needs)
            return Drafter(model, two_stage.stage1_max_tokens)
        return None


def tier_for(score: float, configured: Sequence[TierConfig]) -> Tier:
    """The first tier that takes requests of this score; the largest where none does. Other names are no tiers."""
    tiers = [each for each in configured if each.name in list(Tier)]
    return next((Tier(each.name) for each in tiers if score <= each.max_score), Tier.POWERFUL)


def tiers_for(configured: Sequence[TierConfig]) -> frozenset[Tier]:
    """The tiers that some score picks."""
    # The lowest of all, and those right above each bound.
    scores = (0.0, *(math.nextafter(each.max_score, math.inf) for each in configured))
    return frozenset(tier_for(score, configured) for score in scores if 0 <= score <= HIGHEST)


def _order(wanted: Tier) -> tuple[Tier, ...]:
    """The tiers in which a model is looked for: the one that is wanted, larger ones, smaller ones."""
    place = BY_SIZE.index(wanted)
    return (*BY_SIZE[place:], *reversed(BY_SIZE[:place]))


def _looked_at(body: bytes) -> tuple[Complexity, bool]:
    """How hard a request is, and whether a draft would spoil nothing that it asks for."""
    asked = taken_apart(body)
    return complexity(question_of(asked)), takes_draft(asked)
