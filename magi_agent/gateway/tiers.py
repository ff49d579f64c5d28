"""Choosing one of a tier's models for a request that names the tier: pure functions over what is known of each.

::

    "model": "tier:fast" ──▶ tier_of ──▶ the models of that tier whose kind the path is for ──▶ in_order ──▶ the first

Those that answer at once come first, in the order of the active profile's ``loadBalancing``. Where there is none, one
that is started for requests is: best one that is coming up already.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final

from magi_agent.profiles.profile import LoadBalancing, LoadBalancingStrategy
from magi_agent.vocabulary import ServerState, Tier

PREFIX: Final = "tier:"
"""Before a tier's name where a model's name stands; no id has a colon, and no alias may begin so."""
BY_SIZE: Final = (Tier.FAST, Tier.BALANCED, Tier.POWERFUL)
"""The tiers, from the smallest models to the largest."""
_COMING: Final = frozenset({ServerState.STARTING, ServerState.LOADING})
_IN_TROUBLE: Final = frozenset({ServerState.FAILED, ServerState.COOLDOWN, ServerState.STUCK})
_EMBEDDING_PATH: Final = re.compile(r"(?:/v1)?/embeddings?")
_RERANKING_PATH: Final = re.compile(r"(?:/v1)?/rerank(?:ing)?")


class Kind(StrEnum):
    """What a model's server is for."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANKING = "reranking"


class Prospect(Enum):
    """What would become of a request for a tier."""

    READY = auto()
    """It would go to a model that answers."""
    STARTED = auto()
    """A model would be started for it, or is coming up already."""
    REFUSED = auto()
    """It would have to wait for a model, and be refused."""
    NONE = auto()
    """There is none for it."""

    def is_good(self, *, on_demand: bool) -> bool:
        """Whether it would be answered: at once, or ``on_demand`` after a start."""
        return self is Prospect.READY or (on_demand and self is Prospect.STARTED)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that a request for its tier may go to, as it is now."""

    model_id: str
    state: ServerState
    is_open: bool
    """Whether a request would be let through to its server at once."""
    is_ready: bool
    """Whether its server answers, and is not about to leave."""
    starts: bool
    """Whether it is started for requests."""
    is_awaited: bool = False
    """Whether requests wait for it."""
    free_slots: int = 0
    """Requests that its server can work on beside those that it has; below 0 where it has more than it can."""
    is_silent: bool = False
    """Whether its server did not answer when it was asked how busy it is."""
    size_bytes: int = 0


def tier_of(name: str | None) -> Tier | None:
    """The tier that a model's name means; ``None`` where it means none. Raises ``ValueError`` for one there is not."""
    if name is None or not name.casefold().startswith(PREFIX):
        return None
    return Tier(name[len(PREFIX) :].casefold())


def kind_for(path: str) -> Kind:
    """Which kind of model a path is for."""
    if _EMBEDDING_PATH.fullmatch(path):
        return Kind.EMBEDDING
    return Kind.RERANKING if _RERANKING_PATH.fullmatch(path) else Kind.COMPLETION


def in_order(
    candidates: Sequence[Candidate], balancing: LoadBalancing, last: str | None, dice: random.Random
) -> list[Candidate]:
    """Those that answer now, the one first that is to be asked.

    ``last`` is the model that was chosen last: where models are equal, the one after it is next.
    """
    ready = sorted((one for one in candidates if one.is_ready), key=lambda one: one.model_id)
    if not balancing.enabled:
        return ready
    match balancing.strategy:
        case LoadBalancingStrategy.RANDOM:
            dice.shuffle(ready)
            return sorted(ready, key=lambda one: not one.is_open)
        case LoadBalancingStrategy.LEAST_LOADED:
            return sorted(_after(ready, last), key=lambda one: (not one.is_open, one.is_silent, -one.free_slots))
        case LoadBalancingStrategy.ROUND_ROBIN:
            return sorted(_after(ready, last), key=lambda one: not one.is_open)


def to_start(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that a request may wait for, the best first: what is coming up, then what loads soonest."""
    return sorted(
        (one for one in candidates if one.starts),
        key=lambda one: (not is_coming(one), one.state in _IN_TROUBLE, one.size_bytes, one.model_id),
    )


def is_coming(candidate: Candidate) -> bool:
    """Whether it is brought up already."""
    return candidate.is_awaited or candidate.state in _COMING


def _after(ready: list[Candidate], last: str | None) -> list[Candidate]:
    later = [one for one in ready if last is not None and one.model_id > last]
    return later + [one for one in ready if one not in later]
