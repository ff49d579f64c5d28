"""Models as JSON, made once for each model as it is, and joined once for each state of the registry.

Listing a thousand models costs a thousand encodings the first time, spread over several turns of the event loop, one
for each model that changed after that, and a look-up while nothing changes.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

from pydantic_core import to_json

from magi_agent.api.exchange import array
from magi_agent.api.representations import model_answer, readable
from magi_agent.api.schemas import RegistryAnswer, TierThresholdsAnswer
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.settings import Settings
from magi_agent.vocabulary import Tier

_AT_ONCE: Final = 16
"""Models encoded before others get a turn; about a millisecond."""
_NO_MODELS: Final = b'{"models":{}'


class ModelDocuments:
    """The bodies that list models."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._encoded: dict[str, tuple[Model, bytes]] = {}
        self._bodies: dict[str, tuple[int, bytes]] = {}

    def model(self, model: Model) -> bytes:
        """One model."""
        known = self._encoded.get(model.model_id)
        if known is not None and known[0] is model:
            return known[1]
        encoded = model_answer(model).model_dump_json(by_alias=True).encode()
        self._encoded[model.model_id] = (model, encoded)
        return encoded

    async def registry(self) -> bytes:
        """All of the registry. Raises ``ServiceUnavailable`` before it is loaded."""
        models, revision = self._registry.models, self._registry.revision
        body = self._kept("", revision)
        if body is None:
            rest = self._rest()
            encoded = await self._each(models.values())
            entries = (to_json(model_id) + b":" + one for model_id, one in zip(models, encoded, strict=True))
            body = b'{"models":{' + b",".join(entries) + b"}" + rest
            self._bodies[""] = (revision, body)
            if len(self._encoded) > len(models):
                self._encoded = dict(zip(models, zip(models.values(), encoded, strict=True), strict=True))
        return body

    async def tier(self, tier: Tier) -> bytes:
        """The models whose effective tier is ``tier``. Raises ``ServiceUnavailable`` before the registry is loaded."""
        models, revision = self._registry.models, self._registry.revision
        body = self._kept(tier, revision)
        if body is None:
            body = array(await self._each(model for model in models.values() if model.effective_tier is tier))
            self._bodies[tier] = (revision, body)
        return body

    def _kept(self, name: str, revision: int) -> bytes | None:
        kept = self._bodies.get(name)
        return kept[1] if kept is not None and kept[0] == revision else None

    async def _each(self, models: Iterable[Model]) -> list[bytes]:
        encoded = []
        for number, model in enumerate(models, 1):
            encoded.append(self.model(model))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return encoded

    def _rest(self) -> bytes:
        """What the registry's answer has beside the models, from after them to its end."""
        settings = self._settings
        folders = [readable(str(path)) for path in settings.model_scan_path]
        answer = RegistryAnswer(
            models={},
            scan_path=":".join(folders),
            last_scan=self._registry.last_scan,
            port_range=settings.port_range,
            tier_thresholds=TierThresholdsAnswer(powerful_min=settings.powerful_min, fast_max=settings.fast_max),
            scan_paths=folders,
        )
        return answer.model_dump_json(by_alias=True).encode().removeprefix(_NO_MODELS)
