"""On-demand models that do not fit into memory together take turns."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import psutil
import pytest

from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.conftest import SampleModels

MODELS = ["api-room-a", "api-room-b", "api-room-c"]
CONTEXT = 300_000
"""Tokens: some 7 GB of cache for SmolLM2, of which next to nothing is ever touched."""
ROOM = 10 << 30
"""Bytes: for one, and not for two, also where other programs come and go meanwhile."""
pytestmark = pytest.mark.timeout(600)
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


@pytest.fixture
async def api(memory_to_itself: None, serve: Serve, models: Path, sample_models: SampleModels) -> Api:
    """Three models, and memory for one of them."""
    for model_id in MODELS:
        shutil.copyfile(sample_models.smollm2, models / f"{model_id}.gguf")
        with (models / f"{model_id}.gguf").open("ab") as file:
            file.write(model_id.encode())
    reserve = psutil.virtual_memory().available - ROOM
    api = await serve(memory_reserve=str(reserve), gateway_queue="1000")
    for model_id in MODELS:
        settings = {"startPolicy": "onDemand", "ctxSize": CONTEXT, "parallelSlots": 4}
        (await api.ask("PUT", f"/api/models/{model_id}/settings", settings)).success()
        (await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})).success()
    return api


async def ask(api: Api, model_id: str, number: int = 0) -> str:
    body = {"model": model_id, "prompt": f"{number}", "max_tokens": 2, "temperature": 0}
    return str((await api.ask("POST", "/v1/completions", body)).success()["model"])


async def starts_of(api: Api, model_id: str) -> int:
    """How often a model's server was started."""
    log = await api.get(f"/api/models/servers/{model_id}/logs?lines=10000")
    return len({entry["invocationId"] for entry in log["entries"] if entry["source"] == "server"})


def running(api: Api) -> list[str]:
    return sorted(api.services.servers.ready())


@ONE_LISTENER
async def test_one_that_is_idle_leaves_for_one_that_is_asked(api: Api) -> None:
    for model_id in (*MODELS, *MODELS):
        assert await ask(api, model_id) == model_id
        assert running(api) == [model_id]


@ONE_LISTENER
async def test_all_of_two_hundred_requests_to_three_models_are_answered(api: Api) -> None:
    asked = [MODELS[number % 3] for number in range(200)]
    answered = await asyncio.wait_for(asyncio.gather(*(ask(api, each, n) for n, each in enumerate(asked))), 240)

    assert answered == asked
    assert len(running(api)) == 1
    starts = [await starts_of(api, model_id) for model_id in MODELS]
    # Those that wait for one model are served together.
    assert sum(starts) <= 12, starts


@ONE_LISTENER
async def test_one_that_answers_is_waited_for_and_has_the_next_turn(api: Api) -> None:
    first, second, _ = MODELS
    body = {"model": first, "prompt": "a", "stream": True, "max_tokens": 300, "ignore_eos": True}
    await ask(api, first)
    async with api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        await answer.content.readany()
        other = asyncio.create_task(ask(api, second))

        async def waits() -> bool:
            return bool(api.services.lanes._lanes[first].yields)

        await until(waits, "the other one waits for it", 20)
        again = asyncio.create_task(ask(api, first))
        rest = await answer.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert await other == second
    assert await again == first


@ONE_LISTENER
async def test_what_is_pinned_or_not_for_requests_never_leaves(api: Api) -> None:
    first, second, _ = MODELS
    settings = {"startPolicy": "onDemand", "ctxSize": CONTEXT, "pinned": True}
    (await api.ask("PUT", f"/api/models/{first}/settings", settings)).success()
    await ask(api, first)

    reply = await api.ask("POST", "/v1/completions", {"model": second, "prompt": "a"})

    assert (reply.status, reply.body["error"]["code"]) == (409, "insufficient_memory")
    assert running(api) == [first]
    assert not api.services.servers.is_wanted(second)
