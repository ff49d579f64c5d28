"""The models of each tier, and which of them a request goes to.

How busy a server is with what came through the gateway is known at once. What others ask it directly it has to say
itself: it is asked at most once in the profile's ``healthCheckInterval``, when a request wants to know.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from magi_agent.errors import NotFound, ServiceUnavailable
from magi_agent.gateway.lanes import Lanes
from magi_agent.gateway.senses import NOTHING, Sense, said
from magi_agent.gateway.tiers import PREFIX, Candidate, Kind, Prospect, in_order, is_coming, tier_of, to_start
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profile import LoadBalancing, LoadBalancingStrategy
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.settings import NO_PROJECTOR
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.servers import Servers
from magi_agent.servers.usage import ServersUsage, ServerUsage
from magi_agent.vocabulary import Tier

_KINDS: Final = {"generate": Kind.COMPLETION, "embedding": Kind.EMBEDDING, "rerank": Kind.RERANKING}
_PATIENCE: Final = 0.25
"""Seconds that a request waits for servers to say how busy they are; then the gateway's own figures do."""
_OUTDATED: Final = 2.0
"""Seconds after which servers are asked anew, whoever had them asked before."""
_MOST_WEIGHED: Final = 16
"""Models of which it is worked out whether they fit into memory, for one request."""
_RETRY_AFTER: Final = 2


class EmptyTier(NotFound):
    """There is no such tier, or no model of it that the request could be for."""

    error = "ModelNotFound"

    @classmethod
    def without(cls, kind: Kind, needs: frozenset[Sense], *, name: str, of: str = "") -> "EmptyTier":
        """No model ``of`` those that ``name`` means is of a kind, and has the senses that the request ``needs``."""
        and_senses = f", and {said(needs)} that the request has" if needs else ""
        return cls(
            f"no model{of} is enabled that is for {kind}{and_senses}: GET /v1/models lists what can be asked for",
            {"model": name},
        )


class NoneOfTier(ServiceUnavailable):
    """No model of a tier is ready, and none is started for requests."""

    def __init__(self, tier: Tier, states: dict[str, str]) -> None:
        said = ", ".join(f"{model_id} is {state}" for model_id, state in states.items())
        super().__init__(
            f"{PREFIX}{tier}",
            f"no model of tier {tier} is ready, and none of them is started for requests: {said}; "
            f"magictl start {next(iter(states))} starts one",
            _RETRY_AFTER,
        )
        self.details = {**self.details, "models": states}


@dataclass(frozen=True, slots=True)
class _Outside:
    """How busy a server was when it was asked."""

    invocation_id: str
    slots: int | None
    others: int
    """Requests that it had from others than the gateway."""
    is_silent: bool


class TierModels:
    """Chooses a model for each request that names a tier."""

    def __init__(
        self,
        registry: Registry,
        effective: EffectiveSettings,
        servers: Servers,
        lanes: Lanes,
        usage: ServersUsage,
        active_profile: ActiveProfile,
    ) -> None:
        self._registry = registry
        self._effective = effective
        self._servers = servers
        self._lanes = lanes
        self._usage = usage
        self._active_profile = active_profile
        self._last: dict[tuple[Tier, Kind], str] = {}
        self._dice = random.Random()  # noqa: S311  # no secret
        self._outside: dict[str, _Outside] = {}
        self._asked_at: float | None = None
        self._asking: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """End the question that is under way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def tier(self, name: str | None) -> Tier | None:
        """The tier that a model's name means; ``None`` where it means none. Raises ``EmptyTier``."""
        try:
            return tier_of(name)
        except ValueError:
            tiers = ", ".join(f"{PREFIX}{tier}" for tier in Tier)
            raise EmptyTier(f"there is no tier {name!r}; there are {tiers}", {"model": name}) from None

    def kind_of(self, model: Model) -> Kind:
        """What a model's server is for."""
        mode = self._effective.mode(model)
        if mode is not None:
            return _KINDS[mode]
        if model.facts.is_embedding:
            return Kind.EMBEDDING
        return Kind.RERANKING if model.facts.is_reranker else Kind.COMPLETION

    def senses(self, model: Model) -> frozenset[Sense]:
        """What a model's server can be given beside text: what its projector is for, found or set."""
        projector, facts = self._effective.of(model).projector, model.facts
        if projector == NO_PROJECTOR:
            return NOTHING
        if projector is not None and projector not in facts.projectors:
            # Nobody has looked into one from elsewhere; most are for images.
            return frozenset({Sense.VISION})
        has = {Sense.VISION: facts.has_vision, Sense.AUDIO: facts.has_audio}
        return frozenset(sense for sense, has_it in has.items() if has_it)

    def of(self, tier: Tier) -> list[Model]:
        """The models of a tier that can be asked for: those that are enabled, or run."""
        return [
            model
            for model in self._registry.models.values()
            if model.effective_tier is tier
            and (model.choices.enabled or self._servers.is_wanted(model.model_id))
            and (model.is_usable or self._servers.reach_if_ready(model.model_id) is not None)
        ]

    def best(self, models: list[Model]) -> Model:
        """The one of a tier's models that is the nearest to being ready; of at least one."""
        candidates = [self._candidate(model) for model in models]
        ready = sorted((one for one in candidates if one.is_ready), key=lambda one: one.model_id)
        rest = sorted(candidates, key=lambda one: (not is_coming(one), one.model_id))
        return self._registry.models[[*ready, *to_start(candidates), *rest][0].model_id]

    async def choose(self, tier: Tier, kind: Kind, needs: frozenset[Sense] = NOTHING) -> Model:
        """The model for a request, one with the senses that it ``needs``. Raises ``EmptyTier``, ``NoneOfTier``."""
        balancing = self._balancing()
        if balancing.enabled and balancing.strategy is LoadBalancingStrategy.LEAST_LOADED:
            await self._refresh(balancing.health_check_interval)
        models = self._of_kind(tier, kind, needs)
        if not models:
            raise EmptyTier.without(kind, needs, name=f"{PREFIX}{tier}", of=f" of tier {tier}")
        if (ready := self._next_ready(tier, kind, models)) is not None:
            return ready
        chosen = await self._to_start([self._candidate(model) for model in models.values()])
        if chosen is None:
            raise NoneOfTier(tier, {model_id: self._servers.state(model_id) for model_id in sorted(models)})
        return models[chosen.model_id]

    def prospect(self, tier: Tier, kind: Kind, needs: frozenset[Sense] = NOTHING) -> Prospect:
        """What ``choose`` would find, as far as that is known without asking any server."""
        models = {model.model_id: model for model in self.of(tier)}
        if any(self._lanes.is_up(model_id) and self._is_for(each, kind, needs) for model_id, each in models.items()):
            return Prospect.READY
        order = to_start([self._down(model) for model in models.values()])
        first = next((model for one in order if self._is_for(model := models[one.model_id], kind, needs)), None)
        if first is None:
            return Prospect.NONE
        return Prospect.STARTED if self._lanes.can_start(first) else Prospect.REFUSED

    def another(self, tier: Tier, kind: Kind, than: Model, needs: frozenset[Sense]) -> Model | None:
        """One of a tier that is ready, in the place of one whose server has just died; ``None`` where there is none."""
        models = self._of_kind(tier, kind, needs)
        models.pop(than.model_id, None)
        return self._next_ready(tier, kind, models)

    def _of_kind(self, tier: Tier, kind: Kind, needs: frozenset[Sense]) -> dict[str, Model]:
        return {model.model_id: model for model in self.of(tier) if self._is_for(model, kind, needs)}

    def _is_for(self, model: Model, kind: Kind, needs: frozenset[Sense]) -> bool:
        return self.kind_of(model) is kind and (not needs or needs <= self.senses(model))

    def _next_ready(self, tier: Tier, kind: Kind, models: Mapping[str, Model]) -> Model | None:
        candidates = [self._candidate(model) for model in models.values()]
        order = in_order(candidates, self._balancing(), self._last.get((tier, kind)), self._dice)
        if not order:
            return None
        self._last[tier, kind] = order[0].model_id
        return models[order[0].model_id]

    def _balancing(self) -> LoadBalancing:
        held = self._active_profile.held
        return held.load_balancing if held else LoadBalancing()

    def _candidate(self, model: Model) -> Candidate:
        model_id = model.model_id
        has, outside = self._lanes.requests(model_id), self._outside.get(model_id)
        slots = (outside.slots if outside else None) or max(self._effective.of(model).parallel_slots or 1, 1)
        most = self._effective.max_concurrent(model)
        return Candidate(
            model_id,
            self._servers.state(model_id),
            is_open=self._lanes.is_open(model_id),
            is_ready=self._lanes.is_up(model_id),
            starts=self._lanes.is_on_demand(model),
            is_awaited=self._lanes.is_awaited(model_id),
            free_slots=(slots if most is None else min(slots, most)) - has - (outside.others if outside else 0),
            is_silent=outside is not None and outside.is_silent,
            size_bytes=model.facts.size_bytes,
        )

    def _down(self, model: Model) -> Candidate:
        """The same of one that does not answer; how busy it might be takes a while to work out."""
        model_id = model.model_id
        return Candidate(
            model_id,
            self._servers.state(model_id),
            is_open=False,
            is_ready=False,
            starts=self._lanes.is_on_demand(model),
            is_awaited=self._lanes.is_awaited(model_id),
            size_bytes=model.facts.size_bytes,
        )

    async def _to_start(self, candidates: list[Candidate]) -> Candidate | None:
        """The one that the request should wait for: one that comes already, else one that nobody has to leave for."""
        order = to_start(candidates)
        if not order or is_coming(order[0]) or len(order) == 1:
            return next(iter(order), None)
        for one in order[:_MOST_WEIGHED]:
            if not await self._servers.not_fitting({one.model_id: True}, self._effective, {}):
                return one
        return order[0]

    async def _refresh(self, interval: float) -> None:
        """Have the servers say how busy they are, where what they said is older than the interval."""
        now = asyncio.get_running_loop().time()
        runs = {model_id: server.invocation_id for model_id, server in self._servers.ready().items()}
        # What an earlier run of a server said is not this one's.
        self._outside = {
            model_id: said for model_id, said in self._outside.items() if said.invocation_id == runs.get(model_id)
        }
        if self._asking is None and (self._asked_at is None or now - self._asked_at >= interval):
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask(runs), name="how busy the servers of a tier are")
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=_PATIENCE)

    async def _ask(self, runs: dict[str, str]) -> None:
        try:
            began = datetime.now(UTC)
            before = {model_id: self._lanes.asking(model_id) for model_id in runs}
            usages = await self._usage.all()
            if usages.at < began:
                # What was said before cannot be compared with what the gateway has under way now.
                await asyncio.sleep(_OUTDATED)
                before = {model_id: self._lanes.asking(model_id) for model_id in runs}
                usages = await self._usage.all()
            self._outside = {
                model_id: _outside(runs[model_id], usage, max(before[model_id], self._lanes.asking(model_id)))
                for model_id, usage in usages.servers.items()
                if model_id in runs
            }
        finally:
            self._asking = None


def _outside(invocation_id: str, usage: ServerUsage, own: int) -> _Outside:
    has = (usage.slots_busy or 0) + (usage.requests_waiting or 0)
    return _Outside(invocation_id, usage.slots_total, max(0, has - own), is_silent=usage.problem is not None)
