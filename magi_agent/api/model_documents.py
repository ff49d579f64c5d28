"""Models as JSON, made once for each model as it is, and joined once for each state of the registry.

Listing a thousand models costs a thousand encodings the first time, spread over several turns of the event loop, one
for each model that changed after that, and a look-up while nothing changes. Each model is kept once: in the last list
of all of them, if it is there as it is. That list is made in one piece: a thousand small ones, given up when they are
joined, would leave the process as large as they were.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic_core import to_json

from magi_agent.api.etag import TaggedBody, tagged
from magi_agent.api.exchange import array
from magi_agent.api.representations import model_answer, readable
from magi_agent.api.schemas import RegistryAnswer, TierThresholdsAnswer
from magi_agent.configuration import Configuration
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.vocabulary import StartPolicy, Tier

_Revision = tuple[int, int, int]
_AT_ONCE: Final = 16
"""Models encoded before others get a turn; about a millisecond."""
_BEFORE_MODELS: Final = b'{"models":{'
_NO_MODELS: Final = _BEFORE_MODELS + b"}"


@dataclass(frozen=True, slots=True)
class _Encoding:
    """A model as it is, as JSON: bytes of its own, or a part of the last list of all models."""

    model: Model
    policy: StartPolicy
    content: bytes | memoryview


class ModelDocuments:
    """The bodies that list models."""

    def __init__(self, registry: Registry, effective: EffectiveSettings, configuration: Configuration) -> None:
        self._registry = registry
        self._effective = effective
        self._configuration = configuration
        self._encoded: dict[str, _Encoding] = {}
        self._one_list = asyncio.Lock()
        self._bodies: dict[str, tuple[_Revision, TaggedBody]] = {}

    @property
    def revision(self) -> _Revision:
        """Grows with every change of what the bodies are made from."""
        return self._registry.revision, self._effective.revision, self._configuration.revision

    def model(self, model: Model) -> bytes:
        """One model."""
        return bytes(self._kept_encoding(model).content)

    def _kept_encoding(self, model: Model) -> _Encoding:
        self._encoded[model.model_id] = encoding = self._encoding(model)
        return encoding

    def _encoding(self, model: Model) -> _Encoding:
        policy = self._effective.start_policy(model)
        known = self._encoded.get(model.model_id)
        if known is not None and known.model is model and known.policy is policy:
            return known
        return _Encoding(model, policy, model_answer(model, policy).model_dump_json(by_alias=True).encode())

    async def registry(self) -> TaggedBody:
        """All of the registry. Raises ``ServiceUnavailable`` before it is loaded."""
        # Who asks while it is made takes the same one.
        async with self._one_list:
            models, revision = self._registry.models, self.revision
            return self._kept("", revision) or await self._list(models, revision)

    async def _list(self, models: Mapping[str, Model], revision: _Revision) -> TaggedBody:
        rest = self._rest()
        content = bytearray(_BEFORE_MODELS)
        places: list[tuple[Model, StartPolicy, slice]] = []
        for number, (model_id, model) in enumerate(models.items(), 1):
            encoding = self._encoding(model)
            content += (b"," if places else b"") + to_json(model_id) + b":"
            start = len(content)
            content += encoding.content
            places.append((model, encoding.policy, slice(start, len(content))))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        content += b"}" + rest
        body = await tagged(bytes(content))
        if self._keep("", revision, body):
            view = memoryview(body.content)
            self._encoded = {model.model_id: _Encoding(model, policy, view[place]) for model, policy, place in places}
        return body

    async def tier(self, tier: Tier) -> TaggedBody:
        """The models whose effective tier is ``tier``. Raises ``ServiceUnavailable`` before the registry is loaded."""
        models, revision = self._registry.models, self.revision
        body = self._kept(tier, revision)
        if body is None:
            encoded = await self._each(model for model in models.values() if model.effective_tier is tier)
            body = await tagged(array([one.content for one in encoded]))
            self._keep(tier, revision, body)
        return body

    def _kept(self, name: str, revision: _Revision) -> TaggedBody | None:
        kept = self._bodies.get(name)
        return kept[1] if kept is not None and kept[0] == revision else None

    def _keep(self, name: str, revision: _Revision, body: TaggedBody) -> bool:
        kept = self._bodies.get(name)
        # One that took longer to make than a later one must not take that one's place.
        if kept is not None and kept[0] > revision:
            return False
        self._bodies[name] = (revision, body)
        return True

    async def _each(self, models: Iterable[Model]) -> list[_Encoding]:
        encoded = []
        for number, model in enumerate(models, 1):
            encoded.append(self._kept_encoding(model))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return encoded

    def _rest(self) -> bytes:
        """What the registry's answer has beside the models, from after them to its end."""
        settings = self._configuration.settings
        folders = [readable(str(path)) for path in settings.model_scan_path]
        answer = RegistryAnswer(
            models={},
            scan_path=":".join(folders),
            last_scan=self._registry.last_scan,
            port_range=self._registry.port_range or settings.port_range,
            tier_thresholds=TierThresholdsAnswer(powerful_min=settings.powerful_min, fast_max=settings.fast_max),
            scan_paths=folders,
            allowed_flags=list(settings.allowed_flags),
        )
        return answer.model_dump_json(by_alias=True).encode().removeprefix(_NO_MODELS)
