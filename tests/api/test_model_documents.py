"""Bodies that list models: made once, and never old."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.api.etag import TaggedBody
from magi_agent.api.model_documents import ModelDocuments
from magi_agent.api.representations import model_answer
from magi_agent.api.schemas import ModelAnswer
from magi_agent.configuration import Configuration
from magi_agent.discovery.facts import ModelFacts
from magi_agent.events import EventStream
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import Settings
from magi_agent.vocabulary import ModelStatus, StartPolicy, ThinkingMode, Tier


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"model_scan_path": str(tmp_path)}, {})


def facts(number: int) -> ModelFacts:
    return ModelFacts(
        file_path=f"/models/m{number}.gguf",
        filename=f"m{number}.gguf",
        display_name=f"Model {number}",
        family="llama",
        version=None,
        size_params=7.0,
        quantization="q8_0",
        thinking_mode=ThinkingMode.NONE,
        is_instruct=False,
        is_coder=False,
        assigned_tier=Tier.BALANCED,
        architecture="llama",
        context_length=512,
        size_bytes=1000,
        parts=(f"/models/m{number}.gguf",),
        projector_path=None,
        has_vision=False,
        is_embedding=False,
        has_chat_template=False,
        status=ModelStatus.OK,
        problem=None,
        parameter_count=7_000_000_000,
        active_params=None,
        identity=None,
        fingerprint=None,
    )


async def loaded(tmp_path: Path, count: int) -> Registry:
    registry = Registry(tmp_path / "registry.json", EventStream())
    await registry.load()
    await registry.merge([facts(number) for number in range(count)], ())
    return registry


def made_from(registry: Registry, settings: Settings) -> ModelDocuments:
    return ModelDocuments(registry, EffectiveSettings(settings.defaults), Configuration(settings))


async def test_nothing_is_made_anew_while_nothing_changes(tmp_path: Path, settings: Settings) -> None:
    documents = made_from(await loaded(tmp_path, 50), settings)

    body = await documents.registry()

    assert await documents.registry() is body
    assert await documents.tier(Tier.BALANCED) is await documents.tier(Tier.BALANCED)


async def test_a_change_costs_the_model_that_changed(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await loaded(tmp_path, 50)
    documents = made_from(registry, settings)
    before = await documents.registry()
    encoded = []

    def note(model: Model, policy: StartPolicy) -> ModelAnswer:
        encoded.append(model.model_id)
        return model_answer(model, policy)

    monkeypatch.setattr("magi_agent.api.model_documents.model_answer", note)

    await registry.choose("m7", lambda choices: replace(choices, tier_override=Tier.FAST))

    after = json.loads((await documents.registry()).content)
    assert json.loads(before.content)["models"]["m7"]["tierOverride"] is None
    assert after["models"]["m7"]["tierOverride"] == "fast"
    assert [model["modelId"] for model in json.loads((await documents.tier(Tier.FAST)).content)] == ["m7"]
    assert len(json.loads((await documents.tier(Tier.BALANCED)).content)) == 49
    assert [json.loads(documents.model(model)) for model in registry.models.values()] == list(after["models"].values())
    assert encoded == ["m7"]


async def test_models_are_kept_once(tmp_path: Path, settings: Settings) -> None:
    registry = await loaded(tmp_path, 50)
    documents = made_from(registry, settings)

    for _ in range(2):
        body = await documents.registry()

        assert all(
            isinstance(kept.content, memoryview) and kept.content.obj is body.content
            for kept in documents._encoded.values()
        )
        await registry.choose("m7", lambda choices: replace(choices, tier_override=Tier.FAST))


async def test_what_went_is_forgotten(tmp_path: Path, settings: Settings) -> None:
    registry = await loaded(tmp_path, 50)
    documents = made_from(registry, settings)
    await documents.registry()

    await registry.merge([facts(1)], ())

    assert list(json.loads((await documents.registry()).content)["models"]) == ["m1"]
    assert list(documents._encoded) == ["m1"]


async def test_many_models_are_encoded_in_turns(tmp_path: Path, settings: Settings) -> None:
    documents = made_from(await loaded(tmp_path, 1000), settings)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    bodies = await asyncio.gather(documents.registry(), documents.registry(), documents.tier(Tier.BALANCED))
    counting.cancel()

    assert turns > 30, "others have their turn meanwhile"
    assert bodies[0] == bodies[1]
    assert len(json.loads(bodies[0].content)["models"]) == len(json.loads(bodies[2].content)) == 1000


async def test_who_asks_while_a_list_is_made_takes_the_same(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = made_from(await loaded(tmp_path, 50), settings)
    encoded = []

    def note(model: Model, policy: StartPolicy) -> ModelAnswer:
        encoded.append(model.model_id)
        return model_answer(model, policy)

    monkeypatch.setattr("magi_agent.api.model_documents.model_answer", note)

    first, second = await asyncio.gather(documents.registry(), documents.registry())

    assert first is second
    assert len(encoded) == len(set(encoded)) == 50


async def test_a_list_is_not_made_of_pieces_that_are_given_up_after_it(tmp_path: Path, settings: Settings) -> None:
    documents = made_from(await loaded(tmp_path, 1000), settings)

    slow = asyncio.create_task(documents.registry())
    for _ in range(10):
        await asyncio.sleep(0)

    assert not slow.done()
    assert not documents._encoded
    await slow
    assert len(documents._encoded) == 1000


async def test_a_change_meanwhile_is_in_the_next_answer(tmp_path: Path, settings: Settings) -> None:
    registry = await loaded(tmp_path, 1000)
    documents = made_from(registry, settings)

    slow = asyncio.create_task(documents.registry())
    await asyncio.sleep(0)
    await registry.choose("m999", lambda choices: replace(choices, tier_override=Tier.FAST))
    newer = await documents.registry()
    await slow

    assert json.loads(newer.content)["models"]["m999"]["tierOverride"] == "fast"
    assert await documents.registry() is newer


async def test_one_that_took_long_does_not_take_the_place_of_a_later_one(tmp_path: Path, settings: Settings) -> None:
    registry = await loaded(tmp_path, 1000)
    documents = made_from(registry, settings)
    slow = asyncio.create_task(documents.registry())
    await asyncio.sleep(0)
    documents._keep("", (registry.revision + 1, 0, 0), later := TaggedBody(b"later", "later"))

    await slow

    assert documents._bodies[""][1] is later


async def test_a_reload_is_in_the_next_answer(tmp_path: Path, settings: Settings) -> None:
    configuration = Configuration(settings, lambda: replace(settings, port_range=(9000, 9009)))
    registry = await loaded(tmp_path, 3)
    documents = ModelDocuments(registry, EffectiveSettings(settings.defaults), configuration)
    before = await documents.registry()

    await configuration.reload()

    after = await documents.registry()
    assert json.loads(before.content)["portRange"] == [8080, 8099]
    assert json.loads(after.content)["portRange"] == [9000, 9009]
    assert before.tag != after.tag
